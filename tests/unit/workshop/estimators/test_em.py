"""The M steps against scikit-learn, closed forms and each other."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from workshop.estimators.em import (
    EXACT,
    SoftmaxProblem,
    ascend,
    ascend_all,
    design_of,
    least_squares,
    log_softmax,
    log_sum_exp,
    penalty_of,
)


def fit_softmax(
    rows: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    ridge: float = 1e-3,
    bias_ridge: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight [C, F] and the bias [C] of one softmax regression."""
    weighted = targets if sample_weight is None else targets * sample_weight[:, None]
    penalty = penalty_of(rows.shape[1], ridge, bias_ridge)
    problem = SoftmaxProblem(design_of(rows), weighted, penalty)
    coefficients, is_converged = ascend(problem, np.zeros(problem.shape), max_iter=100)
    assert is_converged
    np.testing.assert_allclose(coefficients.sum(axis=1), 0.0, atol=1e-12)
    return coefficients[:-1].T, coefficients[-1]


def probabilities(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(rows @ weight.T + bias))


def test_least_squares_equals_linear_regression_of_each_expert() -> None:
    rng = np.random.default_rng(0)
    rows, targets, weights = rng.normal(size=(80, 5)), rng.normal(size=(80, 3)), rng.random((80, 4))
    found = least_squares(design_of(rows), targets, weights, penalty_of(5, 0.0, 0.0))
    for expert in range(4):
        peer = LinearRegression().fit(rows, targets, sample_weight=weights[:, expert])
        np.testing.assert_allclose(found[expert, :-1].T, peer.coef_, atol=1e-12)
        np.testing.assert_allclose(found[expert, -1], peer.intercept_, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-14, 1e-6])
def test_least_squares_where_columns_repeat_and_where_no_row_counts(ridge: float) -> None:
    rng = np.random.default_rng(2)
    column = rng.normal(size=(30, 1))
    rows = np.hstack([column, column])
    weights = np.column_stack([np.ones(30), np.zeros(30)])
    found = least_squares(design_of(rows), 3 * column, weights, penalty_of(2, ridge, ridge))
    np.testing.assert_allclose(found[0, :2, 0], [1.5, 1.5], atol=1e-5)
    np.testing.assert_array_equal(found[1], 0.0)


@pytest.mark.parametrize("regularisation", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("num_classes", [3, 5])
def test_fit_softmax_equals_logistic_regression(num_classes: int, regularisation: float) -> None:
    rng = np.random.default_rng(num_classes)
    rows, weights = rng.normal(size=(150, 4)), rng.random(150)
    labels = (
        rows @ rng.normal(size=(4, num_classes)) + rng.gumbel(size=(150, num_classes))
    ).argmax(1)
    weight, bias = fit_softmax(
        rows, np.eye(num_classes)[labels], weights, ridge=1 / regularisation, bias_ridge=0.0
    )
    peer = LogisticRegression(C=regularisation, tol=1e-12, max_iter=10_000, solver="newton-cg")
    peer.fit(rows, labels, sample_weight=weights)
    np.testing.assert_allclose(weight, peer.coef_, atol=1e-6)
    np.testing.assert_allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=1e-6)


def test_soft_targets_equal_each_row_once_for_each_class_by_its_weight() -> None:
    rng = np.random.default_rng(4)
    rows, soft = rng.normal(size=(60, 3)), rng.dirichlet(np.ones(4), size=60)
    weight, bias = fit_softmax(rows, soft, ridge=0.5, bias_ridge=0.0)
    peer = LogisticRegression(C=2.0, tol=1e-12, max_iter=10_000, solver="newton-cg")
    peer.fit(np.repeat(rows, 4, axis=0), np.tile(np.arange(4), 60), sample_weight=soft.ravel())
    np.testing.assert_allclose(weight, peer.coef_, atol=1e-6)
    np.testing.assert_allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=1e-6)


def test_separable_classes_end_and_all_are_right() -> None:
    rows = np.linspace(-1, 1, 40)[:, None]
    labels = (rows[:, 0] > 0).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = probabilities(rows, *fit_softmax(rows, np.eye(2)[labels], ridge=0.0))
    np.testing.assert_allclose(found[np.arange(40), labels], 1.0, atol=1e-3)


def test_too_few_steps_do_not_converge() -> None:
    rng = np.random.default_rng(7)
    targets = rng.dirichlet(np.ones(3), size=30)
    problem = SoftmaxProblem(design_of(rng.normal(size=(30, 2))), targets, np.full(3, 1e-3))
    assert not ascend(problem, np.zeros(problem.shape), max_iter=1)[1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 40),
    num_classes=st.integers(1, 5),
    spread=st.sampled_from([1.0, 30.0, 1e4]),
    ridge=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_no_newton_step_lowers_an_objective(
    seed: int, num_rows: int, num_classes: int, spread: float, ridge: float
) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.dirichlet(np.full(num_classes, 0.3), size=num_rows)
    targets *= rng.integers(0, 3, size=(num_rows, 1))  # some rows, or all, without weight
    design = design_of(spread * rng.normal(size=(num_rows, 3)))
    problem = SoftmaxProblem(design, targets, penalty_of(3, ridge, 1e-6))
    coefficients = rng.normal(size=problem.shape)
    coefficients -= coefficients.mean(axis=1, keepdims=True)
    before = problem.objective(coefficients, log_softmax(design @ coefficients))
    for _ in range(6):
        coefficients, _ = ascend(problem, coefficients, max_iter=1)
        after = problem.objective(coefficients, log_softmax(design @ coefficients))
        assert np.isfinite(after)
        assert after >= before - 1e-9 * (1 + abs(before))
        before = after


def test_models_side_by_side_equal_each_alone() -> None:
    rng = np.random.default_rng(8)
    rows, targets = rng.normal(size=(70, 3)), rng.dirichlet(np.ones(3), size=(70, 4))
    targets *= np.array([1.0, 1e-3, 0.0, 5.0])[:, None]
    penalty, begun = penalty_of(3, 1e-2, 1e-4), np.zeros((4, 4, 3))
    together = ascend_all(design_of(rows), targets, penalty, begun, 50, EXACT)
    for model in range(4):
        alone = fit_softmax(rows, targets[:, model], ridge=1e-2, bias_ridge=1e-4)
        np.testing.assert_allclose(together[:-1, model].T, alone[0], atol=1e-7)
        np.testing.assert_allclose(together[-1, model], alone[1], atol=1e-7)
    np.testing.assert_array_equal(together[:, 2], 0.0)


def test_log_sum_exp_of_far_scores() -> None:
    scores = np.array([[1e4, 1e4 - 1.0], [-1e4, -1e4], [-np.inf, 3.0], [-np.inf, -np.inf]])
    expected = [1e4 + np.log1p(np.exp(-1.0)), -1e4 + np.log(2), 3.0, -np.inf]
    np.testing.assert_allclose(log_sum_exp(scores)[:, 0], expected, rtol=1e-15)


def test_least_squares_with_a_ridge_for_each_model_and_output() -> None:
    rng = np.random.default_rng(9)
    rows, targets, weights = rng.normal(size=(40, 3)), rng.normal(size=(40, 2)), rng.random((40, 2))
    scale = np.array([[0.5, 2.0], [3.0, 0.1]])
    found = least_squares(design_of(rows), targets, weights, penalty_of(3, 2.0, 0.0), scale)
    for model in range(2):
        for output in range(2):
            peer = Ridge(alpha=2.0 * scale[model, output])
            peer.fit(rows, targets[:, output], sample_weight=weights[:, model])
            np.testing.assert_allclose(found[model, :-1, output], peer.coef_, atol=1e-12)
            np.testing.assert_allclose(found[model, -1, output], peer.intercept_, atol=1e-12)
