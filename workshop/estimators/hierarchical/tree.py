"""A tree of softmax gates over experts, and its expectation-maximisation.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm". All gates of a
level have the same number of choices. Dimension letters: N rows, D columns of the design, E
experts, L levels; G gates of a level with B choices each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from workshop.estimators.ascent import Ascent, Limits
from workshop.estimators.choices import Array, log_softmax, log_sum_exp, sum_of_choices
from workshop.estimators.em import ROUGH, SoftmaxProblem, ascend
from workshop.estimators.hierarchical.leaves import Leaves

_ROUNDING = 1e-9
"""The most that rounding may lower the objective, relative to the sum of its terms."""


@dataclass(frozen=True)
class Rows:
    """The rows of a fit: design [N, D], targets [N, O] and weights [N], all above 0."""

    design: Array
    targets: Array
    weight: Array

    @property
    def mass(self) -> float:
        """The sum of the weights."""
        return float(self.weight.sum())


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
            problem = SoftmaxProblem(rows.design, targets, self.penalty)
            gates.append(ascend(problem, level, self.newton_steps, tolerance=ROUGH)[0])
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
