"""Training of the bundled mixtures: the same bytes from the same seed, and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from skops.io import get_untrusted_types, load, loads
from threadpoolctl import threadpool_limits

from benchmarks.bundled import __main__ as command
from benchmarks.bundled import diabetes, sequences
from benchmarks.bundled.card import table
from benchmarks.bundled.readings import make_batches
from benchmarks.bundled.trained import is_held_out
from experts.checkpoint.hash_cache import BESIDE
from experts.checkpoint.identity import identity_of
from experts.checkpoint.mixture import open_mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.estimators import MixtureOfExpertsRegressor
from workshop.estimators.saved.served import estimator_bytes

BUNDLED = Path(__file__).parents[3] / "deploy" / "models"


@pytest.fixture(autouse=True, scope="module")
def _one_thread_of_blas() -> Iterator[None]:
    """Threads of BLAS wait for each other longer than such small products take."""
    with threadpool_limits(1):
        yield


def test_equal_estimators_have_equal_bytes_and_load_as_they_were() -> None:
    x, y = load_diabetes(return_X_y=True)
    first, second = (make_pipeline(StandardScaler(), SVR(C=30)).fit(x, y) for _ in range(2))
    data = estimator_bytes(first)
    assert data == estimator_bytes(second)
    assert data != estimator_bytes(make_pipeline(StandardScaler(), SVR(C=31)).fit(x, y))
    loaded = loads(data, trusted=get_untrusted_types(data=data))
    assert loaded.predict(x).tolist() == first.predict(x).tolist()


def test_a_table_has_its_numbers_readable() -> None:
    rows = [("a", 0.12345, 1234567, np.float32(2)), ("b", "", np.int64(3), "-")]
    assert table(("", "x", "y", "z"), rows).splitlines() == [
        "|  | x | y | z |",
        "|---|---|---|---|",
        "| a | 0.1235 | 1,234,567 | 2.0000 |",
        "| b |  | 3 | - |",
    ]


@pytest.fixture(scope="module")
def diabetes_anew(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The folder that the command writes."""
    out = tmp_path_factory.mktemp("bundled")
    assert command.main(["diabetes", "--out", str(out)]) == 0
    return out / "diabetes"


def test_training_anew_gives_the_bundled_mixture(diabetes_anew: Path) -> None:
    """On any BLAS: experts differ by what their solvers leave open, and the mixture hardly."""
    made, bundled = open_mixture(diabetes_anew), open_mixture(BUNDLED / "diabetes")
    assert made.spec == bundled.spec
    x, y = load_diabetes(return_X_y=True, scaled=False)
    is_out = is_held_out(len(x))
    new, old = (experts_of(folder) for folder in (diabetes_anew, BUNDLED / "diabetes"))
    off = {name: np.abs(new[name].predict(x) - old[name].predict(x)).max() for name in old}
    assert off["svr"] < 10 * old["svr"][-1].tol
    assert off["mlp"] < 10 * spread_by_rounding(old["mlp"], x[~is_out], y[~is_out])
    assert off["forest"] < 1e-9
    first, second = (LocalMixture(mixture).predict({"patient": x}) for mixture in (made, bundled))
    weights = [one["weights"].mean(0) for one in (first, second)]
    assert np.ptp(weights, axis=0).max() < 0.03  # roundings move them by 0.01
    scores = [r2_score(y[is_out], one["progression"][is_out, 0]) for one in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    card = (diabetes_anew / "README.md").read_text(encoding="utf-8")
    assert f"`{identity_of(made)}`" in card
    assert "{" not in card.split("## Use")[0]


def experts_of(folder: Path) -> dict[str, Any]:
    """Return a mixture's estimators by their names."""
    files = {path.stem: path for path in folder.glob("*.skops")}
    return {
        name: load(file, trusted=get_untrusted_types(file=file)) for name, file in files.items()
    }


def spread_by_rounding(expert: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Return how far the predictions of fits lie apart that differ by roundings.

    ``expert`` standardises its inputs, so their scale changes nothing but how they are rounded.
    """
    scales = [1 + 2.0**-power for power in range(30, 38)]
    fits = [clone(expert).fit(x * scale, y).predict(x * scale) for scale in scales]
    return np.ptp(fits, axis=0).max()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_training_twice_gives_the_same_bits(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (of_all[:90] for of_all in load_diabetes(return_X_y=True, scaled=False))
    monkeypatch.setattr(diabetes, "load_diabetes", lambda **_: (x, y))
    forest = ("forest", RandomForestRegressor(4, max_features=0.4))
    monkeypatch.setattr(diabetes, "EXPERTS", [*diabetes.EXPERTS[:2], forest])
    quick = partial(MixtureOfExpertsRegressor, cv=3, n_init=1, max_iter=3)
    monkeypatch.setattr(diabetes, "MixtureOfExpertsRegressor", quick)
    assert command.main(["diabetes", "--out", str(tmp_path)]) == 0
    second = diabetes.train(lambda name: None)
    files = [file for file in (tmp_path / "diabetes").rglob("*") if file.is_file()]
    first = {str(file.relative_to(tmp_path / "diabetes")): file.read_bytes() for file in files}
    del first["README.md"], first[BESIDE]
    document = yaml.safe_load(first.pop("mixture.yaml"))
    assert first == second.files
    assert document == yaml.safe_load(yaml.safe_dump(dict(second.spec)))


def test_a_short_training_of_sequences_has_the_bundled_format_and_the_same_bits_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = make_batches()[:8]
    monkeypatch.setattr(sequences, "make_batches", lambda: few)
    monkeypatch.setattr(sequences, "MAX_ITER", 2)
    with pytest.warns(ConvergenceWarning):
        first, second = (sequences.train(lambda name: None) for _ in range(2))
    assert first.files == second.files
    document = yaml.safe_load((BUNDLED / "sequences" / "mixture.yaml").read_text("utf-8"))
    assert yaml.safe_load(yaml.safe_dump(dict(first.spec))) == document
    bundled = {file.name for file in (BUNDLED / "sequences").iterdir()}
    assert first.files.keys() == bundled - {"mixture.yaml", "README.md"}


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["digit"])
    assert "digits, diabetes, hierarchy, sequences" in capsys.readouterr().err
