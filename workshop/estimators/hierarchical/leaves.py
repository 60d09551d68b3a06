"""The experts of a hierarchical mixture inside a fit: linear Gaussian ones and softmax ones.

Inputs and targets are standardised. Dimension letters: N rows, D columns of the design, E experts,
O outputs, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workshop.estimators.choices import Array, log_softmax
from workshop.estimators.em import ROUGH, SoftmaxProblem, ascend, least_squares

VARIANCE_ROWS = 0.1
"""The weight of a variance's prior, in rows whose squared residual is the target's variance."""


class Leaves(Protocol):
    """All experts of a tree, immutable."""

    def log_density(self, design: Array, targets: Array) -> Array:
        """Return log P(target | row, expert), [N, E]."""

    def log_prior(self) -> float:
        """Return the log of the prior density of all parameters, up to a constant."""

    def maximised(self, design: Array, targets: Array, row_weight: Array) -> Leaves:
        """Return the experts after an M step with the posteriors ``row_weight`` [N, E].

        It never lowers Σ row_weight · log_density + log_prior.
        """


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

    @classmethod
    def empty(
        cls, num_experts: int, num_outputs: int, penalty: Array, min_variance: float
    ) -> GaussianLeaves:
        """Return experts without rows."""
        return cls(
            np.zeros((num_experts, len(penalty), num_outputs)),
            np.ones((num_experts, num_outputs)),
            penalty,
            min_variance,
        )

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

    @classmethod
    def empty(
        cls, num_experts: int, num_classes: int, penalty: Array, newton_steps: int
    ) -> SoftmaxLeaves:
        """Return experts without rows."""
        return cls(np.zeros((len(penalty), num_experts, num_classes)), penalty, newton_steps)

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
        problem = SoftmaxProblem(design, soft, self.penalty)
        coefficients, _ = ascend(problem, self.coefficients, self.newton_steps, tolerance=ROUGH)
        return SoftmaxLeaves(coefficients, self.penalty, self.newton_steps)
