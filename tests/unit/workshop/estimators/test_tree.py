"""Expectation-maximisation in a tree: the steps by hand and by brute force, and its promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import norm

from workshop.estimators.em import Rows, design_of, penalty_of
from workshop.estimators.hierarchical.starts import grouped, random_start
from workshop.estimators.hierarchical.tree import (
    VARIANCE_ROWS,
    GaussianLeaves,
    SoftmaxLeaves,
    Tree,
    empty_gates,
    fit_tree,
)
from workshop.estimators.iterative import Limits

TREES = [(1,), (2,), (3,), (2, 2), (3, 1, 2), (2, 2, 2)]


def drawn(
    seed: int, branching: tuple[int, ...], kind: str, num_rows: int = 40, penalty: float = 1e-3
) -> tuple[Tree, Rows]:
    """Return a tree of random coefficients, and rows of random targets and weights."""
    rng = np.random.default_rng(seed)
    num_experts, num_features, width = math.prod(branching), 3, 2
    design = design_of(rng.normal(size=(num_rows, num_features)))
    ridge = penalty_of(num_features, penalty, penalty)
    leaves: Any
    if kind == "gaussian":
        targets = rng.normal(size=(num_rows, width))
        coefficients = rng.normal(size=(num_experts, num_features + 1, width))
        variances = rng.uniform(0.5, 2, size=(num_experts, width))
        leaves = GaussianLeaves(coefficients, variances, ridge, 1e-6)
    else:
        targets = np.eye(width + 1)[rng.integers(0, width + 1, size=num_rows)]
        shape = (num_features + 1, num_experts, width + 1)
        leaves = SoftmaxLeaves(rng.normal(size=shape), ridge, 2)
    gates = tuple(rng.normal(size=g.shape) for g in empty_gates(branching, num_features + 1))
    weight = rng.choice([0.3, 1.0, 2.0, 50.0], size=num_rows)
    return Tree(gates, leaves, ridge, 2), Rows(design, targets, weight)


def empty_tree() -> Tree:
    """Return a tree of four experts for two features and one output, without coefficients."""
    penalty = np.full(3, 1e-2)
    leaves = GaussianLeaves(np.zeros((4, 3, 1)), np.ones((4, 1)), penalty, 1e-6)
    return Tree(empty_gates((2, 2), 3), leaves, penalty, 2)


def test_the_e_step_by_brute_force() -> None:
    """Posteriors are h_i h_{j|i}, and the likelihood is sum_i g_i sum_j g_{j|i} P_ij."""
    tree, rows = drawn(0, (2, 3), "gaussian")
    leaves: Any = tree.leaves
    posteriors, likelihood = tree.expectation(rows)
    expected = 0.0
    for n, row in enumerate(rows.design):
        top = softmax(row @ tree.gates[0][:, 0])
        joint = np.empty((2, 3))
        for i in range(2):
            below = softmax(row @ tree.gates[1][:, i])
            for j in range(3):
                means = row @ leaves.coefficients[3 * i + j]
                deviations = np.sqrt(leaves.variances[3 * i + j])
                joint[i, j] = (
                    top[i] * below[j] * norm.pdf(rows.targets[n], means, deviations).prod()
                )
        of_gate = joint.sum(axis=1) / joint.sum()
        within = joint / joint.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(posteriors[n], (of_gate[:, None] * within).ravel(), rtol=1e-10)
        expected += rows.weight[n] * np.log(joint.sum())
    np.testing.assert_allclose(likelihood, expected, rtol=1e-12)


def test_one_iteration_of_two_experts_by_hand() -> None:
    """Experts of means 0 and 2 and variance 1, equal gates, rows with y = 0, 0, 1, 2.

    The posterior of the first is 1 / (1 + exp(2 y − 2)): 0.880797, 0.880797, 0.5, 0.119203, whose
    sum is 2.380797. Its next mean is (0.5 + 2 · 0.119203) / 2.380797 = 0.310151, its gate's weight
    2.380797 / 4 = 0.595199. Its squares are 2 · 0.880797 · 0.310151² + 0.5 · 0.689849² +
    0.119203 · 1.689849² = 0.747794; with the prior's tenth of a row the variance is
    (0.747794 + 0.1) / (2.380797 + 0.1) = 0.341742.
    """
    assert VARIANCE_ROWS == 0.1
    design = design_of(np.zeros((4, 1)))
    coefficients = np.array([[[0.0], [0.0]], [[0.0], [2.0]]])
    penalty = penalty_of(1, 1.0, 0.0)
    leaves = GaussianLeaves(coefficients, np.ones((2, 1)), penalty, 1e-6)
    tree = Tree(empty_gates((2,), 2), leaves, penalty_of(1, 1.0, 1e-12), 20)
    rows = Rows(design, np.array([[0.0], [0.0], [1.0], [2.0]]), np.ones(4))
    posteriors, _ = tree.expectation(rows)
    first = [0.880797, 0.880797, 0.5, 0.119203]
    np.testing.assert_allclose(posteriors[:, 0], first, atol=1e-6)
    after = tree.maximised(rows, posteriors)
    experts: Any = after.leaves
    np.testing.assert_allclose(experts.coefficients[0, :, 0], [0, 0.310151], atol=1e-6)
    np.testing.assert_allclose(experts.variances[0], 0.341742, atol=1e-6)
    np.testing.assert_allclose(np.exp(after.log_gates(design))[:, 0], 0.595199, atol=1e-6)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100_000),
    branching=st.sampled_from(TREES),
    kind=st.sampled_from(["gaussian", "classes"]),
    num_rows=st.integers(1, 60),
    penalty=st.sampled_from([1e-8, 1e-3, 1.0]),
    by_posteriors=st.booleans(),
)
def test_the_objective_never_falls(
    seed: int,
    branching: tuple[int, ...],
    kind: str,
    num_rows: int,
    penalty: float,
    by_posteriors: bool,
) -> None:
    tree, rows = drawn(seed, branching, kind, num_rows, penalty)
    rng = np.random.default_rng(seed)
    experts = math.prod(branching)
    start = rng.dirichlet(np.full(experts, 0.2), size=num_rows) if by_posteriors else None
    fitted = fit_tree(tree, rows, Limits(12, 0.0, 12), start)
    objectives = np.array(fitted.objectives)
    if not by_posteriors:
        before = (tree.expectation(rows)[1] + tree.log_prior()) / rows.mass
        objectives = np.insert(objectives, 0, before)
    assert np.isfinite(objectives).all()
    assert np.all(np.diff(objectives) >= -1e-9 * (1 + np.abs(objectives[1:])))


class Forgetful(GaussianLeaves):
    """Leaves whose M step forgets what they knew."""

    def maximised(self, design: np.ndarray, targets: np.ndarray, row_weight: np.ndarray) -> Any:
        return replace(self, variances=2 * self.variances)


def test_a_fall_of_the_objective_is_an_error() -> None:
    tree, rows = drawn(1, (2,), "gaussian")
    fitted = fit_tree(tree, rows, Limits(20, 0.0, 20)).best
    wrong = replace(fitted, leaves=Forgetful(**vars(fitted.leaves)))
    with pytest.raises(
        ArithmeticError, match=r"the objective fell from .* in iteration 1; a larger"
    ):
        fit_tree(wrong, rows, Limits(5, 0.0, 5))


@pytest.mark.parametrize("kind", ["gaussian", "classes"])
def test_an_expert_without_rows_is_the_prior(kind: str) -> None:
    tree, rows = drawn(2, (2, 2), kind)
    start = np.full((len(rows.weight), 4), [0.5, 0.5, 0.0, 0.0])
    after = tree.maximised(rows, start)
    experts: Any = after.leaves
    if kind == "gaussian":
        np.testing.assert_array_equal(experts.coefficients[2:], 0.0)
        np.testing.assert_allclose(experts.variances[2:], 1.0, rtol=1e-12)
    else:
        np.testing.assert_array_equal(experts.coefficients[:, 2:], 0.0)
    weights = np.exp(after.log_gates(rows.design))
    # Its own gate has no rows either, and the gate above it has hardly any weight for it.
    np.testing.assert_array_equal(after.gates[1][:, 1], 0.0)
    assert np.isfinite(after.expectation(rows)[1])
    assert 0 < weights[:, 2:].max() < 0.1


def test_held_out_rows_choose_the_tree() -> None:
    tree, rows = drawn(3, (2, 2), "gaussian", num_rows=60)
    train, held_out = (
        Rows(rows.design[part], rows.targets[part], rows.weight[part])
        for part in (slice(25), slice(25, None))
    )
    start = np.random.default_rng(0).dirichlet(np.ones(4), size=25)
    fitted = fit_tree(tree, train, Limits(50, 0.0, 5), start, held_out)
    score = fitted.best.expectation(held_out)[1] / held_out.mass
    np.testing.assert_allclose(score, max(fitted.scores), rtol=1e-12)
    assert len(fitted.scores) == len(fitted.objectives) < 50
    assert fitted.is_converged
    assert int(np.argmax(fitted.scores)) == len(fitted.scores) - 6


def test_a_tree_is_judged_by_the_rows_held_out_from_the_beginning() -> None:
    """Rows held out are less likely than those of the fit, and yet a later tree can be best."""
    tree, rows = drawn(6, (2,), "gaussian")
    far = Rows(rows.design, 3 * rows.targets, rows.weight)
    fitted = fit_tree(tree, rows, Limits(5, 0.0, 5), held_out=far)
    scores = [t.expectation(far)[1] / far.mass for t in (tree, fitted.best)]
    assert fitted.score == max(scores[0], *fitted.scores) == pytest.approx(scores[1])


def test_cells_are_cut_level_by_level() -> None:
    rng = np.random.default_rng(7)
    features = rng.normal(size=(60, 2))
    rows = Rows(design_of(features), features[:, :1], np.ones(60))
    start = random_start(empty_tree(), rows, (2, 2), rng, by_cells=True)
    cell = start.argmax(axis=1)
    assert set(cell.tolist()) == {0, 1, 2, 3}
    assert np.all(start.max(axis=1) > 0.9)
    within = [features[cell == number].var(axis=0).sum() for number in range(4)]
    assert np.average(within, weights=np.bincount(cell)) < 0.7 * features.var(axis=0).sum()


@pytest.mark.parametrize("branching", [(2, 2), (3, 4)])
def test_pieces_are_grouped_as_gates_can_tell_them_apart(branching: tuple[int, int]) -> None:
    """Pieces along a line, in another order: neighbours share a gate.

    Of 12 pieces in 3 groups there are 5775 groupings, more than are tried.
    """
    number = math.prod(branching)
    features = np.linspace(-1, 1, 20 * number)[:, None]
    along = np.random.default_rng(number).permutation(number)
    rows = Rows(design_of(features), features, np.ones(len(features)))
    pieces = np.eye(number)[np.repeat(along, 20)]
    order = grouped(rows, pieces, branching, np.full(2, 1e-3), np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(number))
    if number == 4:
        groups = {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())}
        assert groups == {frozenset(along[:2].tolist()), frozenset(along[2:].tolist())}


@pytest.mark.parametrize("num_distinct", [1, 2, 3])
@pytest.mark.parametrize("by_cells", [False, True])
def test_a_start_of_fewer_different_rows_than_experts(num_distinct: int, by_cells: bool) -> None:
    rng = np.random.default_rng(num_distinct)
    features = np.repeat(rng.normal(size=(num_distinct, 2)), 10, axis=0)
    targets = rng.normal(size=(len(features), 1))
    rows = Rows(design_of(features), targets, np.ones(len(features)))
    start = random_start(empty_tree(), rows, (2, 2), rng, by_cells)
    assert start.shape == (len(features), 4)
    np.testing.assert_allclose(start.sum(axis=1), 1.0, rtol=1e-12)
    assert start.min() > 0


@pytest.mark.parametrize("by_cells", [False, True])
def test_a_weight_of_2_starts_as_a_row_that_stands_twice(by_cells: bool) -> None:
    rng = np.random.default_rng(4)
    features, targets = rng.normal(size=(40, 2)), rng.normal(size=(40, 1))
    counts = rng.integers(1, 4, size=40)
    weighted = Rows(design_of(features), targets, counts.astype(float))
    twice = np.repeat(np.arange(40), counts)
    repeated = Rows(design_of(features[twice]), targets[twice], np.ones(len(twice)))
    starts = [
        random_start(empty_tree(), rows, (2, 2), np.random.default_rng(5), by_cells)
        for rows in (weighted, repeated)
    ]
    np.testing.assert_allclose(starts[0][twice], starts[1], atol=1e-8)
