"""The benchmark of fitted mixtures: its sets, its comparisons, and when a promise is kept."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from benchmarks.mixture_fit import Result, chosen, difference, measured, pooled, verdicts
from benchmarks.mixture_models import (
    EXPERT,
    MIXTURE,
    PEER,
    SETS,
    Model,
    classifiers,
    pieces,
    regressors,
    two_pieces,
)


def test_no_single_line_explains_the_sets_of_pieces_and_several_do() -> None:
    rows, values = pieces(0)
    assert LinearRegression().fit(rows, values).score(rows, values) < 0.3
    is_one = (rows[:, 0] + 0.5 * rows[:, 1] > 0) & (rows[:, 2] > 0.5 * rows[:, 0])
    fitted = LinearRegression().fit(rows[is_one], values[is_one])
    assert fitted.coef_ == pytest.approx([2, 2, -4], abs=0.1)
    assert np.std(values[is_one] - fitted.predict(rows[is_one])) == pytest.approx(0.2, abs=0.02)
    rows, labels = two_pieces(0)
    left = (rows[:, 0] < 0) & (np.abs(rows[:, 1] + 0.5 * rows[:, 2]) > 0)
    agree = (rows[left, 1] + 0.5 * rows[left, 2] > 0) == labels[left]
    assert agree.mean() == pytest.approx(0.97, abs=0.02)


def test_every_set_has_enough_rows_and_every_mixture_its_own_expert() -> None:
    assert len(SETS) >= 5
    for name, load in SETS.items():
        rows, targets = load(0)
        assert len(rows) == len(targets) >= 150, name
    for models in (regressors(0), classifiers(0)):
        mixtures = [model.name for model in models if model.kind == MIXTURE]
        assert {model.of for model in models if model.kind == EXPERT} == set(mixtures)
        assert sum(model.kind == PEER for model in models) == 5


def test_settings_are_chosen_without_the_rows_of_the_score() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(60, 2))
    values = rows @ [1.0, -1.0] + 0.1 * rng.normal(size=60)
    model = Model("ridge", PEER, Ridge(), {"alpha": (1e-3, 1e6)})
    result = measured("made", model, (rows, values), 3, 0)
    assert (len(result.scores), len(result.fit_s)) == (3, 3)
    assert min(result.scores) > 0.9
    model = Model("ridge", PEER, Ridge(), {"alpha": (1e6,)})
    assert max(measured("made", model, (rows, values), 3, 0).scores) < 0.1


def test_several_experts_must_beat_one_by_the_corrected_test() -> None:
    params = [{"n": 1, "a": 1}, {"n": 1, "a": 2}, {"n": 2, "a": 1}]

    def place(scores: list[list[float]], single: tuple[str, int] | None) -> int:
        splits = {f"split{i}_test_score": row for i, row in enumerate(np.transpose(scores))}
        means = np.mean(scores, axis=1)
        return chosen({"params": params, "mean_test_score": means, **splits}, single)

    unclear = [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.4, 0.6, 0.9]]
    assert (place(unclear, None), place(unclear, ("n", 1))) == (2, 1)
    by_an_error_in_each_fold = [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.52, 0.65, 0.77]]
    assert place(by_an_error_in_each_fold, ("n", 1)) == 1
    clear = [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.7, 0.8, 0.89]]
    assert place(clear, ("n", 1)) == 2
    assert place([[0.9] * 3, [0.5] * 3, [0.6] * 3], ("n", 1)) == 0
    one_row_more_in_one_fold = [[0.9] * 3, [0.9] * 3, [0.91, 0.9, 0.9]]
    assert place(one_row_more_in_one_fold, ("n", 1)) == 0


def test_the_error_of_a_difference_allows_for_the_overlap_of_training_rows() -> None:
    mean, error = difference([0.5, 0.6, 0.8, 0.9], [0.5, 0.5, 0.7, 0.7], 2)
    differences = np.array([0.0, 0.1, 0.1, 0.2])
    assert mean == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std(ddof=1) * (1 / 4 + 1) ** 0.5)


def test_folds_of_all_seeds_are_one_result() -> None:
    parts = [result(name, PEER, [score, 0.5]) for score in (0.1, 0.2) for name in ("a", "b")]
    assert [(one.model, one.scores, len(one.fit_s)) for one in pooled(parts)] == [
        ("a", [0.1, 0.5, 0.2, 0.5], 4),
        ("b", [0.1, 0.5, 0.2, 0.5], 4),
    ]


def result(name: str, kind: str, scores: list[float], of: str = "") -> Result:
    return Result("pieces", name, kind, of, scores, [1.0] * len(scores))


@pytest.mark.parametrize(
    ("expert", "peer", "kept"),
    [
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], [True, True]),
        ([0.95, 0.93, 0.97], [0.5, 0.6, 0.7], [False, True]),
        ([0.92, 0.88, 0.92], [0.5, 0.6, 0.7], [False, True]),  # worse by less than an error
        ([0.91, 0.9, 0.9], [0.5, 0.6, 0.7], [True, True]),  # equal in the mean
        ([0.5, 0.6, 0.7], [0.92, 0.88, 0.89], [True, False]),
    ],
)
def test_a_mixture_is_as_good_as_its_expert_and_wins_the_pieces(
    expert: list[float], peer: list[float], kept: list[bool]
) -> None:
    results = [
        result("mixture", MIXTURE, [0.9, 0.91, 0.9]),
        result("one", EXPERT, expert, "mixture"),
        result("other", EXPERT, [0.0, 0.1, 0.2], "mixture"),
        result("peer", PEER, peer),
        result("weak", PEER, [0.1, 0.2, 0.3]),
    ]
    found = verdicts(results, 3)
    assert [verdict.is_kept for verdict in found] == kept
    assert found[0].figure == "pieces: mixture - one"
    assert found[1].figure == "pieces: mixture - peer"
