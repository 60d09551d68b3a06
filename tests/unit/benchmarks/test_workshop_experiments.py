"""The workshop's experiments: what a label tells, kinds of tokens, and tiny resumed runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from benchmarks import workshop, workshop_experiments, workshop_information
from benchmarks.workshop_experiments import RECIPE, prunings
from benchmarks.workshop_information import (
    Choices,
    Label,
    by_row,
    by_token,
    entropy,
    information,
    kind_of,
    told,
)
from benchmarks.workshop_observed import Observed, in_all_languages
from benchmarks.workshop_tables import spread
from router.workshop.trainer import Trainer
from tests.unit.router.workshop.training_runs import tiny_settings, write_grammar

pytestmark = pytest.mark.usefixtures("one_thread")
SVG = "{http://www.w3.org/2000/svg}"
TINY = tiny_settings(steps=4, checkpoint_every_steps=2)
SMALL = replace(
    RECIPE,
    model={**TINY["model"], "num_local_experts": 3},
    training=TINY["optimization"],
    continued={**TINY["optimization"], "steps": 3},
    calibration_rows=4,
    scored_rows=3,
    observed_rows=6,
    random_seeds=(0, 1),
    shuffles=3,
    least_count=2,
)


def test_information_of_a_worked_case() -> None:
    # x tells all of e where z = 0, and nothing where z = 1: half of ln 2.
    counts = np.array([[[2, 0], [0, 2]], [[1, 1], [1, 1]]])
    assert information(counts) == pytest.approx(math.log(2) / 2)
    # Without z: p(x, e) is 3/8 on the diagonal and 1/8 beside it, and the margins are halves.
    expected = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert information(counts.sum(0, keepdims=True)) == pytest.approx(expected)
    assert entropy(np.array([4, 4, 0])) == pytest.approx(math.log(2))


def test_information_is_that_of_scikit_learn() -> None:
    draws = np.random.default_rng(1)
    label, given = (Label(draws.integers(0, size, 500), size) for size in (5, 3))
    experts = (label.values[:, None] * draws.integers(0, 2, (500, 2)) + [0, 1]) % 6
    nothing = Label(np.zeros(500, int), 1)
    found = information(Choices(experts, 6).counts(label, nothing))
    assert found == pytest.approx(mutual_info_score(np.repeat(label.values, 2), experts.ravel()))
    parts = [
        (given.values == z).mean()
        * mutual_info_score(
            np.repeat(label.values[given.values == z], 2), experts[given.values == z].ravel()
        )
        for z in range(3)
    ]
    assert information(Choices(experts, 6).counts(label, given)) == pytest.approx(sum(parts))


def test_what_a_label_tells_is_beyond_chance() -> None:
    draws = np.random.default_rng(2)
    label = Label(draws.integers(0, 40, 400), 40)
    without = told(Choices(draws.integers(0, 8, (400, 2)), 8), label, by_token(label), 50)
    # Chance alone gives much: about (40 - 1) * (8 - 1) / (2 * 800) nats.
    assert without.by_chance == pytest.approx(39 * 7 / 1600, rel=0.2)
    assert abs(without.share) < 0.02
    assert without.found <= without.most_by_chance
    pairs = np.stack([label.values % 4, 4 + label.values % 4], 1)
    whole = told(Choices(pairs, 8), label, by_token(label), 50)
    # One of a token's two experts is not told by anything: ln 2 of ln 8.
    assert whole.found / whole.entropy == pytest.approx(2 / 3, abs=0.01)
    assert whole.found > whole.most_by_chance


def test_what_is_known_already_tells_nothing_more() -> None:
    draws = np.random.default_rng(3)
    kinds = Label(draws.integers(0, 3, 600), 3)
    halves = Label(kinds.values // 2, 2)
    choices = Choices(kinds.values[:, None] + [0, 3], 6)
    assert told(choices, halves, by_token(halves), 5).share > 0.2
    known = told(choices, halves, by_token(halves, kinds), 5, kinds)
    assert (known.found, known.share) == (0, 0)


def test_shuffles_keep_what_they_must() -> None:
    draws = np.random.default_rng(4)
    rows = np.repeat([7, 3, 9, 5], 5)
    label = Label(np.repeat([0, 1, 1, 2], 5), 3)
    shuffled = by_row(label, rows)(draws)
    assert sorted(shuffled) == sorted(label.values)
    assert all(len(set(shuffled[rows == row])) == 1 for row in rows)
    with pytest.raises(ValueError, match="several values"):
        by_row(Label(np.arange(20), 20), rows)
    mixed = Label(draws.integers(0, 9, 20), 9)
    within = by_token(mixed, label)(draws)
    assert not np.array_equal(within, mixed.values)
    for value in range(3):
        of_it = label.values == value
        assert sorted(within[of_it]) == sorted(mixed.values[of_it])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "words"),
        (" été", "words"),
        ("ing", "parts of words"),
        ("Debian", "capitals"),
        (" 2026", "numbers"),
        ("x86", "numbers"),
        (".", "punctuation"),
        ("。", "punctuation"),
        ('",', "punctuation"),
        ("-----", "code and tables"),
        (" |", "code and tables"),
        ("        ", "spaces"),
        ("\n    ", "line ends"),
        ("ます", "other scripts"),
        ("ディレクトリー", "other scripts"),
        ("\N{REPLACEMENT CHARACTER}", "other scripts"),
    ],
)
def test_a_token_has_a_kind_by_its_text(text: str, kind: str) -> None:
    assert kind_of(text) == kind
    assert kind in workshop_information.KINDS


def test_a_token_of_all_languages_is_often_enough_in_each() -> None:
    ids = np.array([4, 4, 5, 6, 4, 5, 5, 4, 6])
    languages = Label(np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), 2)
    observed = Observed(ids, np.arange(9), languages, {0: np.zeros((9, 2), int)}, 3)
    assert in_all_languages(observed, 2).tolist() == (ids == 4).tolist()
    assert in_all_languages(observed, 1).all()
    assert observed.only(ids == 4).languages.values.tolist() == [0, 0, 1, 1]


def test_each_count_is_pruned_by_importance_and_at_random() -> None:
    assert [count for count, by, _ in prunings(RECIPE) if by == "output"] == list(range(1, 8))
    assert [seed for count, by, seed in prunings(RECIPE) if (count, by) == (1, "random")] == [
        0,
        1,
        2,
    ]
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert spread([2.0], 1) == "2.0"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of tiny experiments, but for the folder; nothing in it is ever made."""
    texts = tmp_path_factory.mktemp("texts")
    files = [write_grammar(texts / f"{name}.txt", seed) for seed, name in enumerate(("en", "de"))]
    return ["experiments", *(word for f in files for word in ("--text", f"{f.stem}={f}"))]


def experiments(monkeypatch: pytest.MonkeyPatch, words: list[str], recipe: Any = SMALL) -> None:
    """Run the command line with a recipe of a few seconds; its bar ends full."""
    begun: list[str] = []
    totals: list[int] = []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Any]:
        totals.append(total)
        yield begun.append

    monkeypatch.setattr(workshop_experiments, "progress", progress)
    real = workshop_experiments.run_part
    with monkeypatch.context() as replaced:
        replaced.setattr(
            workshop, "run_part", lambda parser, options: real(parser, options, recipe)
        )
        assert workshop.main(words) == 0
    assert totals == [len(begun)]


def test_tiny_experiments_are_resumed_with_the_same_figures(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, trained = tmp_path / "kept", []
    words = [*words, "--folder", str(kept)]
    real = Trainer.step

    def step(self: Trainer) -> Any:
        if broken_off and len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(self.config.optimization.steps)
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)
    broken_off = True
    with pytest.raises(KeyboardInterrupt):  # with two of four steps saved
        experiments(monkeypatch, [*words, "--seeds", "0"])
    broken_off = False
    experiments(monkeypatch, [*words, "--seeds", "0", "--json", str(tmp_path / "first.json")])
    assert trained == [4, 4, 4, 4, 4, *[3] * 12], "two steps again, and four models of three more"
    first = json.loads((tmp_path / "first.json").read_text())
    printed = capsys.readouterr().out
    for title in ("held-out perplexity", "pruned", "entropy", "an expert's largest share"):
        assert title in printed

    # Another seed is added, and nothing is done again.
    trained.clear()
    experiments(monkeypatch, [*words, "--seeds", "0", "1", "--json", str(tmp_path / "both.json")])
    assert trained == [4] * 4 + [3] * 12
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["seeds"]["0"] == first["seeds"]["0"]
    assert both["seeds"]["1"]["before"] != first["seeds"]["0"]["before"]
    check_pictures(kept, both)

    # Other settings of a later step make that step anew, and leave the others.
    trained.clear()
    longer = replace(SMALL, continued={**SMALL.continued, "steps": 5})
    experiments(
        monkeypatch, [*words, "--seeds", "0", "--json", str(tmp_path / "third.json")], longer
    )
    assert trained == [5] * 20
    third = json.loads((tmp_path / "third.json").read_text())["seeds"]["0"]
    assert third["before"] == first["seeds"]["0"]["before"]
    assert all(third["after"][name] != nats for name, nats in both["seeds"]["0"]["after"].items())


def check_pictures(kept: Path, result: dict[str, Any]) -> None:
    """The heat map has each share, the curves each model, the bars each label."""
    layers = result["seeds"]["1"]["experts"]["layers"]
    titles = [
        one.text or "" for one in ElementTree.parse(kept / "experts-seed-1.svg").iter(f"{SVG}title")
    ]
    expected = [
        f"layer {layer['layer']}, {name}, expert {expert}: {100 * share:.1f} %"
        for layer in layers
        for name, shares in {**layer["kinds"], **layer["languages"]}.items()
        for expert, share in enumerate(shares)
    ]
    assert sorted(titles) == sorted(expected)
    assert {"en", "de", "words", "line ends"} <= words_of(kept / "experts-seed-1.svg")
    assert {"by output", "by weight", "at random", "1", "2", "all 3"} <= words_of(
        kept / "counts.svg"
    )
    assert {*result["seeds"]["1"]["after"], "before continued training"} <= words_of(
        kept / "one_expert.svg"
    )
    assert {*layers[0]["told"], "layer 0", "layer 1"} <= words_of(kept / "information.svg")
    curves = ElementTree.parse(kept / "counts.svg").findall(f"{SVG}polyline")
    assert [len(curve.get("points", "").split()) for curve in curves] == [2, 2, 2]


def words_of(picture: Path) -> set[str]:
    return {one.text or "" for one in ElementTree.parse(picture).iter(f"{SVG}text")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--text", "a=x"], "experiments need --folder"),
        (["--folder", "f", "--text", "a=x"], "of two languages or more"),
        (["--folder", "f", "--text", "a=x", "--text", "a=y", "--text", "b=z"], "each once"),
        (["--folder", "f", "--text", "a"], "'a' is not LANGUAGE=FILE"),
        (["--folder", "f", "--text", "a=x", "--text", "b=y", "--seeds", "1", "1"], "must differ"),
    ],
)
def test_bad_usage(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        workshop.main(["experiments", *given])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_text_that_is_missing_or_short_is_a_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--text", "fr=no.txt", "--folder", str(tmp_path)]
    assert workshop.main([*words, *missing]) == 2
    assert "workshop: no.txt: cannot be read: No such file or directory" in capsys.readouterr().err
