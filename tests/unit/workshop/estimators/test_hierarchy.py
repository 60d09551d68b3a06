"""Hierarchical mixtures as estimators: what they find, scikit-learn's contract, bad input."""

from __future__ import annotations

from typing import Any

import joblib
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.preprocessing import StandardScaler

from tests.unit.workshop.estimators.adaptive_data import two_pieces
from workshop.estimators.estimators import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
)


def planted_tree(seed: int, count: int = 800) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows [N, 3], a target of four linear pieces with noise 0.05, and the pieces [N].

    The first feature cuts at 0, and then the second on the left and the third on the right.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(count, 3))
    right = X[:, 0] > 0
    piece = 2 * right + np.where(right, X[:, 2] > 0.2, X[:, 1] > -0.2)
    slopes = np.array([[3, 0, 1], [-2, 1, 0], [0, 2, -2], [1, -3, 1]])
    y = np.einsum("nf,nf->n", X, slopes[piece]) + np.array([1, -2, 3, 0])[piece]
    return X, y + 0.05 * rng.normal(size=count), piece


def planted_classes(seed: int, count: int = 1200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows [N, 4], labels of one rule on each of four pieces, and the pieces."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(count, 4))
    right = X[:, 0] > 0
    piece = 2 * right + np.where(right, X[:, 2] > 0, X[:, 1] > 0)
    rules = 6 * np.array([[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, -1]])
    scores = np.einsum("nf,nf->n", X, rules[piece])
    return X, np.where(scores + rng.logistic(size=count) > 0, "yes", "no"), piece


@pytest.mark.parametrize("kind", [HierarchicalMixtureRegressor, HierarchicalMixtureClassifier])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_neither_the_order_of_rows_nor_repetition_for_weight_changes_a_bit(kind: Any) -> None:
    rng = np.random.default_rng(14)
    X, y, counts = rng.normal(size=(40, 2)), rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    rows = rng.permutation(np.repeat(np.arange(40), counts))
    shares, order = rng.random(len(rows)), rng.permutation(len(rows))
    mixed = rows[order]
    equal = [
        ((X, y, counts), (X[rows], y[rows])),
        ((X[rows], y[rows], shares), (X[mixed], y[mixed], shares[order])),
    ]
    for pair in equal:
        one, other = (kind(n_init=2, max_iter=5, random_state=0).fit(*data) for data in pair)
        np.testing.assert_array_equal(one.responsibilities(X, y), other.responsibilities(X, y))
        np.testing.assert_array_equal(one.log_likelihoods_, other.log_likelihoods_)


def test_a_planted_tree_is_found() -> None:
    X, y, piece = planted_tree(0)
    fitted = HierarchicalMixtureRegressor(
        (2, 2), ridge=0.01, gate_ridge=1e-3, n_init=4, random_state=0
    ).fit(X, y)
    assert fitted.score(X, y) > 0.98
    leaf = fitted.responsibilities(X, y).argmax(axis=1)
    table = np.zeros((4, 4))
    np.add.at(table, (piece, leaf), 1)
    of_piece = table.argmax(axis=1)
    assert sorted(of_piece.tolist()) == [0, 1, 2, 3]
    assert table.max(axis=1).sum() / len(y) > 0.98
    # Pieces 0 and 1 are below one gate, 2 and 3 below the other.
    assert of_piece[0] // 2 == of_piece[1] // 2 != of_piece[2] // 2 == of_piece[3] // 2
    experts = list(fitted.mixture_.experts.values())
    for place, slopes in enumerate([[3, 0, 1], [-2, 1, 0], [0, 2, -2], [1, -3, 1]]):
        weight, _ = experts[of_piece[place]].layers[0]
        np.testing.assert_allclose(weight[0], slopes, atol=0.06)
    np.testing.assert_allclose(
        fitted.expert_usage_[of_piece], np.bincount(piece) / len(y), atol=0.02
    )
    assert list(fitted.mixture_.gates) == ["gate", "gate.0", "gate.1"]
    assert fitted.mixture_.gates["gate.1"].choices == ("expert.1.0", "expert.1.1")


def test_planted_classes_are_found() -> None:
    X, y, piece = planted_classes(0)
    fitted = HierarchicalMixtureClassifier((2, 2), tol=1e-3, n_init=3, random_state=0).fit(X, y)
    table = np.zeros((4, 4))
    np.add.at(table, (piece, fitted.responsibilities(X).argmax(axis=1)), 1)
    assert sorted(table.argmax(axis=1).tolist()) == [0, 1, 2, 3]
    assert table.max(axis=1).sum() / len(y) > 0.85
    fresh, labels, _ = planted_classes(1)
    assert fitted.score(fresh, labels) > 0.85
    assert LogisticRegression().fit(X, y).score(fresh, labels) < 0.65


def test_one_expert_is_linear_regression() -> None:
    rng = np.random.default_rng(1)
    X = rng.normal([5, -3, 100], [1, 10, 0.1], size=(60, 3))
    y = X @ rng.normal(size=(3, 2)) + rng.normal(size=(60, 2))
    weights = rng.random(60)
    fitted = HierarchicalMixtureRegressor((1,), ridge=1e-10).fit(X, y, weights)
    peer = LinearRegression().fit(X, y, weights)
    np.testing.assert_allclose(fitted.predict(X), peer.predict(X), atol=1e-8)
    np.testing.assert_array_equal(fitted.responsibilities(X, y), 1.0)


def test_one_expert_is_logistic_regression() -> None:
    """The bias has the prior of the other coefficients, as the weight of a column of ones has."""
    X, y = load_iris(return_X_y=True)
    fitted = HierarchicalMixtureClassifier((1, 1), ridge=0.5, max_iter=50, tol=1e-12).fit(X, y)
    peer = LogisticRegression(
        C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cg"
    )
    design = np.column_stack([StandardScaler().fit_transform(X), np.ones(len(X))])
    expected = peer.fit(design, y).predict_proba(design)
    np.testing.assert_allclose(fitted.predict_proba(X), expected, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, (2, 1, None), (1, 2, 2), None])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_pruned_paths_equal_brute_force(top_k: Any) -> None:
    rng = np.random.default_rng(2)
    X, y = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
    parameters = {"n_init": 1, "max_iter": 10, "random_state": 0}
    whole = HierarchicalMixtureRegressor((3, 2, 2), **parameters).fit(X, y)
    pruned = HierarchicalMixtureRegressor((3, 2, 2), top_k=top_k, **parameters).fit(X, y)
    kept = top_k if isinstance(top_k, tuple) else (top_k,) * 3

    def weights(name: str, row: np.ndarray, depth: int) -> dict[str, float]:
        gate = whole.mixture_.gates[name]
        weight, bias = gate.layers[0]
        scores = weight @ row + bias
        chosen = np.argsort(-scores, kind="stable")[: kept[depth]]
        found: dict[str, float] = {}
        for place, share in zip(chosen, softmax(scores[chosen]), strict=True):
            choice = gate.choices[place]
            below = {choice: 1.0} if depth == 2 else weights(choice, row, depth + 1)
            found |= {expert: share * part for expert, part in below.items()}
        return found

    shares = pruned.responsibilities(X)
    for row, share, predicted in zip(X, shares, pruned.predict(X), strict=True):
        expected = weights("gate", row, 0)
        by_name = dict(zip(pruned.mixture_.experts, share, strict=True))
        assert {name for name, part in by_name.items() if part} == set(expected)
        total = np.zeros(2)
        for name, part in expected.items():
            np.testing.assert_allclose(by_name[name], part, rtol=1e-10)
            weight, bias = whole.mixture_.experts[name].layers[0]
            total += part * (weight @ row + bias)
        np.testing.assert_allclose(predicted, total, atol=1e-10)


def test_the_records_are_those_of_the_fit() -> None:
    X, y = two_pieces(3)
    fitted = HierarchicalMixtureRegressor((2,), n_init=2, random_state=0).fit(X, y)
    assert fitted.log_likelihoods_.shape == (fitted.n_iter_,)
    # The prior weighs less the more rows there are: the rest is the mean log likelihood.
    heavy = clone(fitted).fit(X, y, np.full(200, 1e5))
    assert heavy.log_likelihoods_[-1] == pytest.approx(heavy.log_likelihood_, abs=1e-3)
    assert np.mean(fitted.responsibilities(X, y).max(axis=1) > 0.99) > 0.85
    np.testing.assert_allclose(
        fitted.expert_usage_, fitted.responsibilities(X).mean(axis=0), rtol=1e-12
    )


def test_more_experts_than_the_data_has_pieces_are_defined() -> None:
    """Rows that are all the same, and a column that stands twice."""
    rng = np.random.default_rng(6)
    y = rng.normal(3, 2, size=20)
    same = HierarchicalMixtureRegressor((2, 2), n_init=1).fit(np.ones((20, 2)), y)
    np.testing.assert_allclose(same.predict(np.ones((1, 2))), y.mean(), atol=0.3)
    X = rng.normal(size=(50, 1))
    twice = HierarchicalMixtureRegressor((2, 2), n_init=2).fit(np.hstack([X, X]), X[:, 0])
    assert twice.score(np.hstack([X, X]), X[:, 0]) > 0.99
    constant = HierarchicalMixtureRegressor((2,), n_init=1).fit(X, np.full(50, 7.0))
    np.testing.assert_allclose(constant.predict(X), 7.0, rtol=1e-9)
    assert np.isfinite(constant.log_likelihood_)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_warm_start_goes_on() -> None:
    X, y, _ = planted_tree(7, 400)
    at_once = HierarchicalMixtureRegressor(n_init=1, max_iter=200, tol=1e-9, random_state=0)
    on = clone(at_once).set_params(max_iter=7, warm_start=True).fit(X, y)
    before = on.log_likelihoods_[-1]
    on.set_params(max_iter=200).fit(X, y)
    assert on.log_likelihoods_[0] >= before - 1e-9
    np.testing.assert_allclose(on.predict(X), at_once.fit(X, y).predict(X), atol=1e-3)
    with pytest.raises(
        ValueError, match=r"branching=\(3,\) has 3 experts in another tree than the 4"
    ):
        on.set_params(branching=(3,)).fit(X, y)


def test_early_stopping_keeps_the_tree_that_is_best_for_the_rows_held_out() -> None:
    rng = np.random.default_rng(9)
    X, y = rng.normal(size=(120, 5)), rng.normal(size=120)
    fitted = HierarchicalMixtureRegressor(
        ridge=1e-3, early_stopping=True, validation_fraction=0.3, random_state=0
    ).fit(X, y)
    assert fitted.validation_scores_.shape == (fitted.n_iter_,)
    assert fitted.n_iter_ < 200
    assert fitted.validation_scores_.argmax() <= fitted.n_iter_ - 5
    assert fitted.n_samples_fit_ == 84


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_starts_are_the_same_in_parallel() -> None:
    X, y = two_pieces(10)
    alone = HierarchicalMixtureRegressor(n_init=3, max_iter=20, random_state=1).fit(X, y)
    with joblib.parallel_config(backend="threading"):
        side_by_side = clone(alone).set_params(n_jobs=2).fit(X, y)
    np.testing.assert_array_equal(alone.predict(X), side_by_side.predict(X))
    other = clone(alone).set_params(n_init=1, random_state=2).fit(X, y)
    assert alone.log_likelihoods_[-1] >= other.log_likelihoods_[-1] - 1e-3


def test_fewer_rows_with_a_weight_than_experts_are_refused() -> None:
    X, y = two_pieces(13, 30)
    weights = np.where(np.arange(30) < 3, 1, 0)
    with pytest.raises(ValueError, match=r"n_samples=3 with a weight above 0 .* experts, 4"):
        HierarchicalMixtureRegressor(n_init=1).fit(X, y, weights)
    with pytest.raises(ValueError, match="min_variance"):
        HierarchicalMixtureRegressor(min_variance=0.0).fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"branching": ()}, "branching must have from 1 to"),
        ({"branching": (1,) * 65}, r"from 1 to 64 levels \(given: 65\)"),
        ({"branching": (2, 0)}, r"integers of at least 1 \(given: \(2, 0\)\)"),
        ({"branching": 2}, "branching"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": (1,)}, r"top_k=\(1,\) must have one number for each of \(2, 2\)"),
        ({"top_k": (1, 3)}, "must be integers from 1 to the choices"),
        ({"ridge": 0.0}, "ridge"),
        ({"gate_ridge": -1.0}, "gate_ridge"),
        ({"n_init": 0}, "n_init"),
        ({"tol": -1.0}, "tol"),
        ({"branching": (5, 5)}, "n_samples=20 .* at least the number of experts, 25"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict, message: str) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 2)), rng.normal(size=20)
    for estimator, targets in (
        (HierarchicalMixtureRegressor(**parameters), y),
        (HierarchicalMixtureClassifier(**parameters), y > 0),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(X, targets)
