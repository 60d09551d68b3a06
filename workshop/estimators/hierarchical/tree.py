"""A tree of softmax gates over linear or softmax experts, and its expectation-maximisation.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm". All gates of a
level have the same number of choices. Dimension letters: N rows, D columns of the design, E
experts, L levels; G gates of a level with B choices each; O outputs,
C classes. Inputs and targets are standardised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from workshop.estimators.em import (
    Array,
    Rows,
    ascend_all,
    least_squares,
    log_softmax,
    log_sum_exp,
    sum_of_choices,
)
from workshop.estimators.iterative import Ascent, Limits

_ROUNDING = 1e-9
"""The most that rounding may lower the objective, relative to the sum of its terms."""


@dataclass(frozen=True)
class Tree:
    """Gates and experts, immutable: ``gates`` has the coefficients [D, G, B] of each level."""

    gates: tuple[Array, ...]
    leaves: Leaves
    penalty: Array  # [D], of the gates
    newton_steps: int

    def log_gates(self, design: Array) -> Array:
        """Return the log weight [N, E] of each expert: the sum of its path's log gates."""
        path = np.zeros((len(design), 1))
        for level in self.gates:
            flat = design @ level.reshape(len(level), -1)
            weights = log_softmax(flat.reshape(len(design), *level.shape[1:]))
            path = (path[:, :, None] + weights).reshape(len(design), -1)
        return path

    def expectation(self, rows: Rows) -> tuple[Array, float]:
        """Return the posteriors h_i h_{j|i} [N, E] and the log-likelihood of the rows.

        The posterior of a path is its share of the row's likelihood,
        g_i g_{j|i} P_ij / Σ_kl g_k g_{l|k} P_kl.
        """
        joint = self.log_gates(rows.design)
        joint += self.leaves.log_density(rows.design, rows.targets)
        likelihood = log_sum_exp(joint)
        return np.exp(joint - likelihood), float(rows.weight @ likelihood[:, 0])

    def log_prior(self) -> float:
        """Return the log of the prior density of all coefficients, up to a constant."""
        of_gates = sum(float(np.einsum("d,dgb->", self.penalty, level**2)) for level in self.gates)
        return self.leaves.log_prior() - 0.5 * of_gates

    def maximised(self, rows: Rows, posteriors: Array) -> Tree:
        """Return the tree after an M step: each gate and each expert gains, or stays.

        A gate's targets are the posteriors of its choices, h_i h_{j|i}: their sum is the weight
        h_i of the row. The weights of an expert's rows are h_i h_{j|i}.
        """
        weighted = posteriors * rows.weight[:, None]
        gates = []
        for level in self.gates:
            below = weighted.reshape(len(weighted), *level.shape[1:], -1)
            targets = sum_of_choices(below)[..., 0]
            gates.append(ascend_all(rows.design, targets, self.penalty, level, self.newton_steps))
        leaves = self.leaves.maximised(rows.design, rows.targets, weighted)
        return replace(self, gates=tuple(gates), leaves=leaves)


def empty_gates(branching: Sequence[int], num_columns: int) -> tuple[Array, ...]:
    """Return gates of equal weights for each level of a tree."""
    counts = [math.prod(branching[:level]) for level in range(len(branching))]
    return tuple(
        np.zeros((num_columns, count, choices))
        for count, choices in zip(counts, branching, strict=True)
    )


def fit_tree(
    tree: Tree,
    rows: Rows,
    limits: Limits,
    posteriors: Array | None = None,
    held_out: Rows | None = None,
    advance: Callable[[str], object] = lambda remark: None,
) -> Ascent[Tree]:
    """Fit a tree by expectation-maximisation, from ``posteriors`` [N, E] if they are given.

    The objective is (log-likelihood + log prior) / Σ weights, in nats a row. It never falls: each
    M step raises a lower bound of it that touches it at the E step's tree. The best tree is judged
    by it, or by the log-likelihood of rows ``held_out`` a row. Raises ``ArithmeticError`` if the
    objective falls by more than rounding.
    """
    # The first M step from given posteriors has no tree before it to fall from.
    previous = best_score = -math.inf
    if posteriors is None:
        posteriors, likelihood = tree.expectation(rows)
        previous = best_score = (likelihood + tree.log_prior()) / rows.mass
        if held_out is not None:
            best_score = _mean_likelihood(tree, held_out)
    ascent = Ascent(limits, tree, best_score)
    while not ascent.is_over:
        tree = tree.maximised(rows, posteriors)
        posteriors, likelihood = tree.expectation(rows)
        prior = tree.log_prior()
        objective = (likelihood + prior) / rows.mass
        scale = (abs(likelihood) + abs(prior)) / rows.mass + 1.0
        if not objective >= previous - _ROUNDING * scale:
            raise ArithmeticError(
                f"the objective fell from {previous!r} to {objective!r} nats a row in iteration "
                f"{len(ascent.objectives) + 1}; a larger ridge makes the M steps better conditioned"
            )
        score = None if held_out is None else _mean_likelihood(tree, held_out)
        ascent.take(tree, objective, score)
        advance(f"objective {objective:.6g}")
        previous = objective
    return ascent


def _mean_likelihood(tree: Tree, rows: Rows) -> float:
    return tree.expectation(rows)[1] / rows.mass


VARIANCE_ROWS = 0.1
"""The weight of a variance's prior, in rows whose squared residual is the target's variance."""


@dataclass(frozen=True)
class GaussianLeaves:
    """Linear regressions with a variance for each expert and output.

    The prior of a coefficient is N(0, 1 / penalty[d]). That of a variance, of the weight
    :data:`VARIANCE_ROWS`, keeps it from 0 where an expert has fewer rows than coefficients, and
    gives an expert without rows the mean and the variance of the targets. No variance is below
    ``min_variance``.
    """

    coefficients: Array  # [E, D, O]
    variances: Array  # [E, O]
    penalty: Array  # [D]
    min_variance: float

    def log_density(self, design: Array, targets: Array) -> Array:
        """Return log N(target; coefficientsᵀ row, variance), [N, E]."""
        density = np.zeros((len(design), len(self.coefficients)))
        for output in range(targets.shape[1]):
            residuals = targets[:, output, None] - design @ self.coefficients[:, :, output].T
            variance = self.variances[:, output]
            density -= 0.5 * (residuals**2 / variance + np.log(2 * np.pi * variance))
        return density

    def log_prior(self) -> float:
        """Return the log of the prior density, up to a constant."""
        squares = np.einsum("d,edo->", self.penalty, self.coefficients**2)
        spread = VARIANCE_ROWS * (1 / self.variances + np.log(self.variances))
        return float(-0.5 * (squares + spread.sum()))

    def maximised(self, design: Array, targets: Array, row_weight: Array) -> GaussianLeaves:
        """Return the weighted least squares fit by the variances so far, then its variances."""
        coefficients = least_squares(design, targets, row_weight, self.penalty, self.variances)
        squares = np.full(self.variances.shape, VARIANCE_ROWS)
        for output in range(targets.shape[1]):
            residuals = targets[:, output, None] - design @ coefficients[:, :, output].T
            squares[:, output] += np.einsum("ne,ne->e", row_weight, residuals**2)
        variances = squares / (row_weight.sum(axis=0)[:, None] + VARIANCE_ROWS)
        return GaussianLeaves(
            coefficients,
            np.maximum(variances, self.min_variance),
            self.penalty,
            self.min_variance,
        )


@dataclass(frozen=True)
class SoftmaxLeaves:
    """Softmax regressions. The prior of a coefficient is N(0, 1 / penalty[d]).

    It gives a class that an expert never saw a probability above 0, and an expert without rows
    equal probabilities.
    """

    coefficients: Array  # [D, E, C]
    penalty: Array  # [D]
    newton_steps: int

    def log_density(self, design: Array, targets: Array) -> Array:
        """Return Σ_c target_c · log probability_c, [N, E]; targets are 0 or 1."""
        flat = design @ self.coefficients.reshape(len(self.coefficients), -1)
        scores = log_softmax(flat.reshape(len(design), *self.coefficients.shape[1:]))
        return np.einsum("nec,nc->ne", scores, targets)

    def log_prior(self) -> float:
        """Return the log of the prior density, up to a constant."""
        return float(-0.5 * np.einsum("d,dec->", self.penalty, self.coefficients**2))

    def maximised(self, design: Array, targets: Array, row_weight: Array) -> SoftmaxLeaves:
        """Return the experts after ``newton_steps`` rough Newton steps."""
        soft = row_weight[:, :, None] * targets[:, None, :]
        steps = self.newton_steps
        coefficients = ascend_all(design, soft, self.penalty, self.coefficients, steps)
        return SoftmaxLeaves(coefficients, self.penalty, self.newton_steps)


Leaves = GaussianLeaves | SoftmaxLeaves
"""All experts of a tree, immutable; no M step lowers Σ row_weight · log_density + log_prior."""
