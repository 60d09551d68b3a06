"""``expertmesh fit``: what it prints and saves, and which cell, key or row it names as wrong."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from experts.checkpoint.mixture import open_mixture
from router.cli.app import app
from router.cli.rows import parse_rows, read_table
from router.client import MixtureInfo, TensorInfo
from tests.local_mixture import LocalMixture
from workshop.estimators.saved.folder import load

SOURCE = np.random.default_rng(5)
ROWS = SOURCE.uniform(-2, 2, size=(80, 2))
VALUES = np.where(ROWS[:, 0] < 0, 3 * ROWS[:, 1], 1 - 2 * ROWS[:, 1])
PIECES: dict[str, Any] = {
    "estimator": "of_experts",
    "task": "regression",
    "target": "price",
    "experts": {"line": "LinearRegression", "tree": {"estimator": "DecisionTreeRegressor",
                                                     "parameters": {"max_depth": 2}}},
    "parameters": {"max_iter": 5, "n_init": 1, "cv": 3},
}  # fmt: skip
LABELLED = {
    **PIECES,
    "task": "classification",
    "target": "kind",
    "experts": {"line": "LogisticRegression", "tree": {"estimator": "DecisionTreeClassifier",
                                                       "scaled": False}},
}  # fmt: skip


RECURRENT: dict[str, Any] = {
    "estimator": "adaptive", "task": "regression", "target": "last", "values_per_step": 2,
    "parameters": {"n_experts": 2, "experts": "rnn", "cell": ["gru", "plain"], "n_init": 1,
                   "hidden_layer_sizes": 3, "max_iter": 5},
}  # fmt: skip


STEPS_HEADER = ",".join([*(f"t{step}_{value}" for step in range(3) for value in "ab"), "last"])


def csv_lines(header: str = "area,age,price") -> list[str]:
    return [header, *(f"{a:.6f},{b:.6f},{y:.6f}" for (a, b), y in zip(ROWS, VALUES, strict=True))]


class Files:
    """A configuration and a CSV file in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.config, self.data = folder / "pieces.yaml", folder / "pieces.csv"
        self.out = folder / "pieces"
        self.write(PIECES, csv_lines())

    def write(self, config: Any, lines: list[str]) -> None:
        self.config.write_text(yaml.safe_dump(config))
        self.data.write_text("\n".join(lines) + "\n")

    def fit(self, *words: str) -> Result:
        files = map(str, (self.config, self.data, "--out", self.out))
        return CliRunner().invoke(app, ["fit", *files, *words])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_mixture_is_saved_and_scored_beside_its_experts(files: Files) -> None:
    result = files.fit()
    assert result.exit_code == 0, result.stderr
    assert "MixtureOfExpertsRegressor: 2 experts, 64 rows, " in result.stdout
    for words in ("16 held-out rows", "R²", "this mixture", "line alone", "tree alone", "usage"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == (
        f"saved in {files.out}; next: expertmesh serve {files.out}, and in another shell: "
        f"expertmesh predict pieces {files.data} --ignore price"
    )
    assert "MixtureOfExpertsRegressor" in result.stderr, "the bar"
    fitted = load(files.out)
    assert fitted.feature_names_in_.tolist() == ["area", "age"]
    assert fitted.verbose == 0
    served = LocalMixture(open_mixture(files.out)).predict({"x": ROWS})
    np.testing.assert_allclose(served["value"][:, 0], fitted.mixture_.combine(ROWS)[:, 0])
    assert "`area`, `age`" in (files.out / "README.md").read_text()


def test_json_has_the_scores_of_rows_that_the_fit_has_not_seen(files: Files) -> None:
    result = files.fit("--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["rows"], document["held_out_rows"]) == (64, 16)
    assert [fit["name"] for fit in document["fits"]] == ["this mixture", "line alone", "tree alone"]
    fitted = load(files.out)
    assert fitted.n_samples_fit_ == 64
    # The rows held out are those of the seed; the score is that of the saved mixture.
    held_out = train_test_split(np.arange(80), test_size=0.2, random_state=0)[1]
    values = np.round(VALUES, 6)[held_out]
    predicted = fitted.mixture_.combine(np.round(ROWS, 6)[held_out])[:, 0]
    assert document["fits"][0]["r2"] == pytest.approx(r2_score(values, predicted))
    assert document["fits"][0]["rmse"] == pytest.approx(((values - predicted) ** 2).mean() ** 0.5)
    assert sum(document["usage"].values()) == pytest.approx(1)


def test_the_command_that_it_ends_with_takes_the_same_file(files: Files) -> None:
    files.write({**PIECES, "features": ["age", "area"]}, [
        f"{line},{number}" for number, line in enumerate(csv_lines())
    ])  # fmt: skip
    files.data.write_text(files.data.read_text().replace("price,0", "price,a note", 1))
    document = json.loads(files.fit("--json").stdout)
    words = shlex.split(document["next"][1])
    assert words[:4] == ["expertmesh", "predict", "pieces", str(files.data)]
    ignored = words[5::2]
    info = MixtureInfo("pieces", [TensorInfo("x", "FP64", (-1, 2))], [])
    rows = parse_rows(read_table(files.data.read_text().splitlines(), None), info, ignored)
    assert load(files.out).feature_names_in_.tolist() == ["area", "age"], "the file's order"
    np.testing.assert_allclose([row.values["x"] for row in rows], ROWS, atol=1e-6)


@pytest.mark.parametrize(("names", "served"), [((3, 7), [3, 7]), (("no", "yes"), ["no", "yes"])])
def test_classes_are_numbers_where_all_are_and_texts_otherwise(
    names: tuple[Any, Any], served: list[Any], files: Files
) -> None:
    lines = [f"{a},{b},{names[int(a * b > 0)]}" for a, b in ROWS]
    few = {"parameters": {"max_iter": 1, "n_init": 1, "cv": 3}}
    files.write({**LABELLED, **few}, ["area,age,kind", *lines])
    result = files.fit("--json")
    assert result.exit_code == 0, result.stderr
    first, *_ = json.loads(result.stdout)["fits"]
    assert first["accuracy"] > 0.5
    assert first["log_loss"] > 0
    assert load(files.out).classes_.tolist() == served


def test_without_held_out_rows_all_are_fitted_and_nothing_is_scored(files: Files) -> None:
    files.write({**PIECES, "held_out": 0}, csv_lines())
    document = json.loads(files.fit("--json").stdout)
    assert (document["rows"], document["held_out_rows"]) == (80, 0)
    assert [sorted(fit) for fit in document["fits"]] == [["fit_s", "name"]]


def test_several_targets_are_predicted_together(files: Files) -> None:
    lines = [f"{a},{b},{a + b},{a - b}" for a, b in ROWS]
    files.write({**PIECES, "target": ["sum", "difference"]}, ["a,b,sum,difference", *lines])
    assert files.fit().exit_code == 0
    assert load(files.out).n_outputs_ == 2


def test_recurrent_experts_take_rows_of_steps(files: Files) -> None:
    steps = SOURCE.normal(size=(60, 6))
    lines = [",".join([*map(str, row), str(row[4] - row[5])]) for row in steps]
    files.write(RECURRENT, [STEPS_HEADER, *lines])
    result = files.fit()
    assert result.exit_code == 0, result.stderr
    fitted = load(files.out)
    served = LocalMixture(open_mixture(files.out)).predict({"x": steps.reshape(-1, 3, 2)})
    np.testing.assert_allclose(served["mean"][:, 0], fitted.predict(steps.reshape(-1, 3, 2)))
    files.write({**RECURRENT, "values_per_step": 4}, [STEPS_HEADER, *lines])
    assert last_line(files.fit("--out", f"{files.out}2")).endswith(
        "has 6 features, which are no multiple of values_per_step 4"
    )


def last_line(result: Result) -> str:
    return [line for line in result.stderr.splitlines() if line][-1]


def test_sequences_of_other_lengths_end_in_empty_cells(files: Files, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [SOURCE.normal(size=(length, 2)) for length in [1, 2, 3] * 20]
    lines = [
        ",".join([*map(str, row.ravel()), *[""] * (6 - row.size), str(row[-1].sum())])
        for row in rows
    ]
    files.write(RECURRENT, [STEPS_HEADER, *lines])
    result = files.fit("--plot", str(tmp_path / "experts.svg"))
    assert result.exit_code == 0, result.stderr
    assert "<svg" in (tmp_path / "experts.svg").read_text()
    assert "one rnn expert, plain" in result.stdout
    served = LocalMixture(open_mixture(files.out))
    for row, expected in zip(rows, load(files.out).predict(rows), strict=True):
        assert served.predict({"x": row[None]})["mean"][0, 0] == pytest.approx(expected, abs=1e-12)
    for broken, message in [
        ("1,2,3,,,,0", "line 3: has 3 values of features, must be one or several steps of 2"),
        (",,,,,,0", "line 3: has 0 values of features, must be one or several steps of 2"),
        ("1,,3,4,,,0", "line 3, column t0_b: is empty"),
        ("1,2,,,,,", "line 3, column last: is empty"),
    ]:
        files.write(RECURRENT, [STEPS_HEADER, lines[0], broken, *lines[2:]])
        assert last_line(files.fit("--out", f"{files.out}2")).endswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["area", "rooms"]},
         "{data}: column rooms: is missing; columns: area, age, price"),
        ({"held_out": 0, "experts": {f"e{n}": "Ridge" for n in range(81)}},
         "{data}: cannot be fitted as {config} says: n_samples=80 "),
        ({"task": "classification", "experts": LABELLED["experts"]},
         "{data}: held_out 0.2 of 80 rows cannot be drawn: The least populated class"),
        ({"parameters": {"max_iters": 5}},
         "{config}: parameters.max_iters: is no parameter; parameters: "),
        ({"parameters": {"random_state": 5}},
         "{config}: parameters.random_state: is given by the key seed"),
        ({"parameters": {"max_iter": 0}},
         "{config}: parameters: The 'max_iter' parameter of MixtureOf"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, files: Files
) -> None:
    files.write({**PIECES, **change}, csv_lines())
    refused(files, f"expertmesh: {message.format(config=files.config, data=files.data)}")


def test_warnings_of_a_fit_are_one_line_each(files: Files) -> None:
    files.write({**PIECES, "parameters": {"max_iter": 1, "cv": 3}}, csv_lines())
    result = files.fit()
    [line] = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert line == "warning: EM did not converge in 1 iterations; raise max_iter or tol"


def changed(place: int, line: str) -> list[str]:
    lines = csv_lines()
    lines[place] = line
    return lines


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(3, "1.5,,2"), "line 4, column age: is empty"),
        (changed(3, "1.5"), "line 4, column age: is empty"),
        (changed(3, "1.5,old,2"), "line 4, column age: must be a finite number; got 'old'"),
        (changed(3, "1.5,nan,2"), "line 4, column age: must be a finite number; got 'nan'"),
        (changed(3, "1.5,1,-inf"), "line 4, column price: must be a finite number; got '-inf'"),
        (changed(3, "1,2,3,4"), "line 4: has 4 cells, but the header has 3"),
        (changed(0, "area,age,cost"), "column price: is missing; columns: area, age, cost"),
        (changed(0, "area,area,price"), "column area: appears twice"),
        (changed(0, ",age,price"), "column 1: has no name; name the features in the configuration"),
        (changed(0, "y,age,price"), "column y: is the name of an input of every fitted mixture"),
        (changed(80, '1,"2,3'), "line 82: is not valid CSV"),
        (["area,age,price"], "has no rows"),
        (csv_lines()[:2], "held_out 0.2 of 1 rows cannot be drawn"),
        (csv_lines()[:4], "held_out 0.2 of 3 rows leaves 1 to test with"),
        (["price", "1", "2"], "has no column besides the target's"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named_by_file_line_and_column(
    lines: list[str], message: str, files: Files
) -> None:
    files.write(PIECES, lines)
    refused(files, f"expertmesh: {files.data}: {message}")


def test_a_folder_or_a_picture_that_could_not_be_written_is_refused_first(
    files: Files, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    files.write({**PIECES, "task": "regression"}, ["not", "read"])
    for words, message in (
        (("--plot", str(tmp_path / "a.doc")), f"--plot: {tmp_path / 'a.doc'}: the suffix must be"),
        (("--plot", str(tmp_path / "no" / "a.svg")), "the folder does not exist"),
        (("--out", str(tmp_path)), f"--out: {tmp_path}: holds other files"),
    ):
        result = files.fit(*words)
        [line] = result.stderr.splitlines()
        assert message in line
        assert result.exit_code == 2


def test_a_missing_file_is_named(files: Files) -> None:
    files.data.unlink()
    refused(files, f"expertmesh: {files.data}: cannot be read: No such file or directory")
    files.config.unlink()
    refused(files, f"expertmesh: {files.config}: cannot be read: No such file or directory")


def refused(files: Files, beginning: str) -> None:
    """Assert that the fit ends with this line, exit code 2 and nothing saved."""
    result = files.fit()
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(beginning), result.stderr
    assert result.stdout == ""
    assert not files.out.exists()
