"""The M steps of mixtures: weighted least squares, and softmax regression by Newton's method.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm": each expert and
each gate is a generalised linear model. The M step maximises Σ h_ij log P_ij(y | x) for an expert
and Σ h_i log g_i(x) for a gate: the posteriors h of the E step are weights of rows, or targets.
Iteratively reweighted least squares is Newton's method here.
Everything is float64, and many models that share the rows are fitted at once.

Dimension letters: N rows, F features, D = F + 1 columns of the design, G models, C classes or
choices, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from workshop.estimators.choices import Array, centred, log_softmax, sum_of_choices

NEWTON_DECREMENT = 1e-10
"""Newton's method ends after a step that promises less than this, in nats a row."""
EXACT, ROUGH = 1e-3, 0.1
"""The relative error of a Newton step's direction. A rough one costs a fraction of an exact one."""
_MOST_CG_STEPS = 200
_MOST_HALVINGS = 40
_ARMIJO = 1e-4
_DAMPING = 1e-12
_LEAST_PIVOT = 1e-6
_MOST_BLOCK_COLUMNS = 8
"""The columns up to which blocks of the Hessian pay as a preconditioner of conjugate gradients."""


def design_of(X: Array) -> Array:
    """Return the design [N, D] of rows [N, F]: their features, and a column of ones."""
    return np.column_stack([X, np.ones(len(X))])


def penalty_of(num_features: int, ridge: float, bias_ridge: float) -> Array:
    """Return the ridge [D] of each row of coefficients: the features', then the bias's."""
    return np.append(np.full(num_features, float(ridge)), float(bias_ridge))


def least_squares(
    design: Array,
    targets: Array,
    row_weight: Array,
    penalty: Array,
    penalty_scale: Array | None = None,
) -> Array:
    """Return coefficients [G, D, O] of G ridge regressions of ``targets`` [N, O].

    ``row_weight`` [N, G] weighs the rows of each. ``penalty`` [D], times ``penalty_scale`` [G, O]
    if it is given, is added to the diagonal of the normal equations, as a Gaussian prior is. Where
    neither decides a coefficient, the solution of the smallest norm is taken.
    """
    coefficients = np.empty((row_weight.shape[1], design.shape[1], targets.shape[1]))
    for model, of_model in enumerate(row_weight.T):
        weighted = design.T * of_model
        normal, cross = weighted @ design, weighted @ targets
        if penalty_scale is None:
            coefficients[model] = _solved(design, targets, of_model, normal, cross, penalty)
            continue
        for output, scale in enumerate(penalty_scale[model]):
            place = slice(output, output + 1)
            coefficients[model, :, place] = _solved(
                design, targets[:, place], of_model, normal, cross[:, place], scale * penalty
            )
    return coefficients


def _solved(
    design: Array, targets: Array, weight: Array, normal: Array, cross: Array, penalty: Array
) -> Array:
    """Return the solution [D, O] of the normal equations with a penalty on their diagonal."""
    solution: Array
    factor, failed = dpotrf(normal + np.diag(penalty), lower=True)
    pivots = np.diag(factor)
    if not failed and pivots.min() > _LEAST_PIVOT * pivots.max():
        solution, _ = dpotrs(factor, cross, lower=True)
        return solution
    root = np.sqrt(weight)[:, None]
    rows = np.vstack([root * design, np.diag(np.sqrt(penalty))])
    values = np.vstack([root * targets, np.zeros((len(penalty), targets.shape[1]))])
    solution, *_ = np.linalg.lstsq(rows, values, rcond=None)
    return solution


@dataclass(frozen=True)
class SoftmaxProblem:
    """G softmax regressions on the same rows.

    The objective of model g, which is concave in its coefficients θ_g [D, C], is
    Σ_nc targets[n, g, c] log softmax(design[n] θ_g)_c − ½ Σ_dc penalty[d] θ_g[d, c]².

    ``targets`` [N, G, C] are not negative and need not add up to 1: their sum over the choices is
    the weight of the row.
    """

    design: Array
    targets: Array
    penalty: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape [D, G, C] of the coefficients of all models."""
        return (self.design.shape[1], *self.targets.shape[1:])

    def scores(self, coefficients: Array) -> Array:
        """Return design · coefficients, [N, G, C]."""
        flat = self.design @ coefficients.reshape(len(coefficients), -1)
        return flat.reshape(-1, *coefficients.shape[1:])

    def transposed(self, rows: Array) -> Array:
        """Return designᵀ · ``rows`` [N, G, C]: [D, G, C]."""
        flat = self.design.T @ rows.reshape(len(rows), -1)
        return flat.reshape(-1, *rows.shape[1:])

    def penalised(self, coefficients: Array) -> Array:
        """Return penalty · coefficients, [D, G, C]."""
        return self.penalty[:, None, None] * coefficients

    def objectives(self, coefficients: Array, log_probabilities: Array) -> Array:
        """Return the objective [G] of each model, given the :func:`log_softmax` of its scores."""
        likelihood = np.einsum("ngc,ngc->g", self.targets, log_probabilities)
        return likelihood - 0.5 * _dot(coefficients, self.penalised(coefficients))

    def of(self, models: Array) -> SoftmaxProblem:
        """Return the problem of some of the models."""
        if len(models) == self.targets.shape[1]:
            return self
        return SoftmaxProblem(self.design, self.targets[:, models], self.penalty)


def ascend(
    problem: SoftmaxProblem,
    coefficients: Array,
    max_iter: int,
    decrement: float = NEWTON_DECREMENT,
    tolerance: float = EXACT,
) -> tuple[Array, bool]:
    """Raise the objectives of all models from ``coefficients`` [D, G, C] by Newton's method.

    ``tolerance`` is the relative error of the steps' directions.
    Returns the new coefficients and whether all models converged, in ``max_iter`` steps or fewer.
    No step lowers an objective by more than rounding. The sum of coefficients over the choices,
    which changes nothing but the penalty, becomes 0.
    """
    coefficients = centred(coefficients)
    mass = problem.targets.sum(axis=(0, 2))
    if problem.shape[2] == 1:
        return coefficients, True
    active = np.flatnonzero(mass > 0)
    starved = np.flatnonzero(mass <= 0)
    # Without rows the prior alone decides, and its maximum is at 0.
    coefficients[:, starved] = 0.0
    for _ in range(max_iter):
        if not len(active):
            break
        part = problem.of(active)
        step, gain = _newton_step(part, coefficients[:, active], mass[active], tolerance)
        coefficients[:, active] += step
        active = active[gain > decrement * mass[active]]
    return coefficients, not len(active)


def _dot(left: Array, right: Array) -> Array:
    """Return the inner products [G] of coefficients [D, G, C]."""
    return np.einsum("dgc,dgc->g", left, right)


def _newton_step(
    problem: SoftmaxProblem, coefficients: Array, mass: Array, tolerance: float
) -> tuple[Array, Array]:
    """Return a step [D, G, C] and the gain [G] that it promised.

    The step lowers no objective by more than rounding. Where none is found, both are 0.
    """
    scores = problem.scores(coefficients)
    log_probabilities = log_softmax(scores)
    before = problem.objectives(coefficients, log_probabilities)
    probabilities = np.exp(log_probabilities)
    row_mass = sum_of_choices(problem.targets)
    residuals = problem.targets - row_mass * probabilities
    # The sum over the choices is 0 but for rounding.
    gradient = centred(problem.transposed(residuals) - problem.penalised(coefficients))
    direction = _newton_direction(problem, row_mass, probabilities, gradient, tolerance)
    promised = _dot(gradient, direction)
    score_direction = problem.scores(direction)
    size = np.ones(len(mass))
    pending = promised > 0
    size[~pending] = 0.0
    # A step whose gain is below rounding is taken whole: near the maximum Newton's method is right.
    rounding = 16 * np.finfo(np.float64).eps * (np.abs(before) + mass)
    for _ in range(_MOST_HALVINGS):
        models = np.flatnonzero(pending)
        if not len(models):
            break
        moved = size[models, None] * direction[:, models]
        after = problem.of(models).objectives(
            coefficients[:, models] + moved,
            log_softmax(scores[:, models] + size[models, None] * score_direction[:, models]),
        )
        needed = before[models] + _ARMIJO * size[models] * promised[models]
        enough = after >= needed - rounding[models]
        pending[models[enough]] = False
        size[models[~enough]] /= 2
    size[pending] = 0.0
    promised = np.where(pending, 0.0, promised)
    return size[None, :, None] * direction, promised / 2


def _newton_direction(
    problem: SoftmaxProblem,
    row_mass: Array,
    probabilities: Array,
    gradient: Array,
    tolerance: float,
) -> Array:
    """Return the solution [D, G, C] of (damping − Hessian) direction = gradient.

    It is found by conjugate gradients, up to the relative error ``tolerance``. The preconditioner
    is the inverse of the Hessian's blocks of one class each, or of its diagonal where the design is
    wide. Memory stays at G·C small matrices, where the whole Hessian has C times as many. The
    damping bounds the step where no row has any curvature left.
    """
    ridge = problem.penalty[:, None] + _DAMPING * (problem.design**2).T @ row_mass[..., 0]
    preconditioned = _preconditioner(problem, row_mass * probabilities * (1 - probabilities), ridge)

    def curved(vector: Array) -> Array:
        scores = problem.scores(vector)
        mean = sum_of_choices(probabilities * scores)
        curvature = problem.transposed(row_mass * probabilities * (scores - mean))
        return curvature + ridge[..., None] * vector

    solution = np.zeros_like(gradient)
    residual = gradient.copy()
    search = preconditioned(residual)
    gain = first_gain = _dot(residual, search)
    for _ in range(_MOST_CG_STEPS):
        open_models = gain > tolerance**2 * first_gain
        if not open_models.any():
            break
        product = curved(search)
        curvature = _dot(search, product)
        open_models &= curvature > 0
        length = np.where(open_models, gain / np.where(open_models, curvature, 1.0), 0.0)
        solution += length[None, :, None] * search
        residual -= length[None, :, None] * product
        ahead = preconditioned(residual)
        new_gain = np.where(open_models, _dot(residual, ahead), 0.0)
        ratio = np.where(open_models, new_gain / np.where(open_models, gain, 1.0), 0.0)
        search = ahead + ratio[None, :, None] * search
        gain = new_gain
    return solution


def _preconditioner(
    problem: SoftmaxProblem, curvature: Array, ridge: Array
) -> Callable[[Array], Array]:
    """Return the map of vectors [D, G, C] by the inverse of a part of the Hessian.

    The part is the blocks designᵀ diag(curvature[:, g, c]) design + ridge[:, g], or their diagonals
    where the design has more columns than :data:`_MOST_BLOCK_COLUMNS`.
    """
    num_columns, num_models, num_classes = problem.shape
    # A column of zeros under no ridge has a gradient of 0: any value will do for it.
    added = np.where(ridge > 0, ridge, 1.0)[..., None]
    of_classes = curvature.reshape(len(curvature), -1)

    if num_columns > _MOST_BLOCK_COLUMNS:
        diagonals = ((problem.design**2).T @ of_classes).reshape(problem.shape) + added
        return lambda vector: centred(vector / diagonals)  # the Hessian's own subspace
    left, right = _upper_triangle(num_columns)
    products = problem.design[:, left] * problem.design[:, right]
    halves = (of_classes.T @ products).reshape(num_models, num_classes, -1)
    blocks = np.empty((num_models, num_classes, num_columns, num_columns))
    blocks[..., left, right] = halves
    blocks[..., right, left] = halves
    np.einsum("gcdd->dgc", blocks)[...] += added
    inverses = np.linalg.inv(blocks)

    def by_blocks(vector: Array) -> Array:
        solved = inverses @ vector.transpose(1, 2, 0)[..., None]
        return centred(solved[..., 0].transpose(2, 0, 1))

    return by_blocks


_upper_triangle = lru_cache(np.triu_indices)
