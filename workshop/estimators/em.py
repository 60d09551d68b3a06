"""The M steps of mixtures: weighted least squares, and softmax regression by Newton's method.

Jordan and Jacobs 1994, "Hierarchical mixtures of experts and the EM algorithm": each expert and
each gate is a generalised linear model. The M step maximises Σ h_ij log P_ij(y | x) for an expert
and Σ h_i log g_i(x) for a gate: the posteriors h of the E step are weights of rows, or targets.
Iteratively reweighted least squares is Newton's method here.
Everything is float64. Sums over the last axis, that of experts, choices or classes, are written
out: it is often two or three long, and numpy's own reductions are many times slower there.

Dimension letters: N rows, F features, D = F + 1 columns of the design, G models, C classes or
choices, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs
from scipy.sparse.linalg import LinearOperator, cg

Array = np.ndarray

_FEW_CHOICES = 16


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

    def of(self, part: Array) -> Rows:
        """Return some of the rows."""
        return Rows(self.design[part], self.targets[part], self.weight[part])


def log_sum_exp(scores: Array) -> Array:
    """Return log Σ exp over the last axis, kept with length 1; -inf where all scores are -inf."""
    top = _over_choices(np.maximum, scores)
    if np.isfinite(top).all():  # no logarithm below is one of 0
        return np.log(sum_of_choices(np.exp(scores - top))) + top
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(sum_of_choices(np.exp(scores - top))) + top


def sum_of_choices(values: Array) -> Array:
    """Return the sum over the last axis, kept with length 1."""
    return _over_choices(np.add, values)


def centred(values: Array) -> Array:
    """Return ``values`` less their mean over the last axis."""
    return values - sum_of_choices(values) / values.shape[-1]


def _over_choices(function: np.ufunc, values: Array) -> Array:
    """Reduce the last axis. numpy's own reduction is many times slower where it is short."""
    if values.shape[-1] > _FEW_CHOICES:
        reduced: Array = function.reduce(values, axis=-1, keepdims=True)
        return reduced
    if values.shape[-1] < 2:
        return values[..., :1].copy()
    result = function(values[..., :1], values[..., 1:2])
    for choice in range(2, values.shape[-1]):
        function(result, values[..., choice : choice + 1], out=result)
    return result


def log_softmax(scores: Array) -> Array:
    """Return the log of the softmax over the last axis."""
    return scores - log_sum_exp(scores)


NEWTON_DECREMENT = 1e-10
"""Newton's method ends after a step that promises less than this, in nats a row."""
EXACT, ROUGH = 1e-3, 0.1
"""The relative error of a Newton step's direction. A rough one costs a fraction of an exact one."""
_MAX_CG_STEPS = 200
_MAX_HALVINGS = 40
_ARMIJO = 1e-4
_DAMPING = 1e-12
_MIN_PIVOT = 1e-6
_MAX_BLOCK_COLUMNS = 8
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
        parts: list[tuple[slice, float]] = [(slice(None), 1.0)]
        if penalty_scale is not None:
            parts = [(slice(o, o + 1), scale) for o, scale in enumerate(penalty_scale[model])]
        for place, scale in parts:
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
    if not failed and pivots.min() > _MIN_PIVOT * pivots.max():
        solution, _ = dpotrs(factor, cross, lower=True)
        return solution
    root = np.sqrt(weight)[:, None]
    rows = np.vstack([root * design, np.diag(np.sqrt(penalty))])
    values = np.vstack([root * targets, np.zeros((len(penalty), targets.shape[1]))])
    solution, *_ = np.linalg.lstsq(rows, values, rcond=None)
    return solution


@dataclass(frozen=True)
class SoftmaxProblem:
    """A softmax regression on rows ``design`` [N, D].

    The objective, which is concave in the coefficients θ [D, C], is
    Σ_nc targets[n, c] log softmax(design[n] θ)_c − ½ Σ_dc penalty[d] θ[d, c]².

    ``targets`` [N, C] are not negative and need not add up to 1: their sum over the choices is the
    weight of the row.
    """

    design: Array
    targets: Array
    penalty: Array

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [D, C] of the coefficients."""
        return self.design.shape[1], self.targets.shape[1]

    def objective(self, coefficients: Array, log_probabilities: Array) -> float:
        """Return the objective, given the :func:`log_softmax` of design · ``coefficients``."""
        likelihood = np.vdot(self.targets, log_probabilities)
        return float(likelihood - 0.5 * self.penalty @ (coefficients**2).sum(axis=1))


def ascend(
    problem: SoftmaxProblem,
    coefficients: Array,
    max_iter: int,
    decrement: float = NEWTON_DECREMENT,
    tolerance: float = EXACT,
) -> tuple[Array, bool]:
    """Raise the objective from ``coefficients`` [D, C] by Newton's method.

    ``tolerance`` is the relative error of the steps' directions. Returns the new coefficients and
    whether they converged, in ``max_iter`` steps or fewer. No step lowers the objective by more
    than rounding. The sum of coefficients over the choices, which changes nothing but the penalty,
    becomes 0.
    """
    coefficients = centred(coefficients)
    mass = float(problem.targets.sum())
    if problem.shape[1] == 1:
        return coefficients, True
    if mass <= 0:  # without rows the prior alone decides, and its maximum is at 0
        return np.zeros_like(coefficients), True
    for _ in range(max_iter):
        step, gain = _newton_step(problem, coefficients, mass, tolerance)
        coefficients = coefficients + step
        if gain <= decrement * mass:
            return coefficients, True
    return coefficients, False


def ascend_all(
    design: Array,
    targets: Array,
    penalty: Array,
    coefficients: Array,
    max_iter: int,
    tolerance: float = ROUGH,
) -> Array:
    """Return coefficients [D, G, C] after :func:`ascend` of G models with targets [N, G, C]."""
    models = zip(targets.swapaxes(0, 1), coefficients.swapaxes(0, 1), strict=True)
    raised = [
        ascend(SoftmaxProblem(design, wanted, penalty), begun, max_iter, tolerance=tolerance)[0]
        for wanted, begun in models
    ]
    return np.stack(raised, axis=1)


def _newton_step(
    problem: SoftmaxProblem, coefficients: Array, mass: float, tolerance: float
) -> tuple[Array, float]:
    """Return a step [D, C] and the gain that it promised.

    The step lowers the objective by no more than rounding. Where none is found, both are 0.
    """
    scores = problem.design @ coefficients
    log_probabilities = log_softmax(scores)
    before = problem.objective(coefficients, log_probabilities)
    probabilities = np.exp(log_probabilities)
    row_mass = sum_of_choices(problem.targets)
    residuals = problem.targets - row_mass * probabilities
    penalised = problem.penalty[:, None] * coefficients
    # The sum over the choices is 0 but for rounding.
    gradient = centred(problem.design.T @ residuals - penalised)
    direction = _newton_direction(problem, row_mass, probabilities, gradient, tolerance)
    promised = float(np.vdot(gradient, direction))
    score_direction = problem.design @ direction
    # A step whose gain is below rounding is taken whole: near the maximum Newton's method is right.
    rounding = 16 * np.finfo(np.float64).eps * (abs(before) + mass)
    for size in 0.5 ** np.arange(_MAX_HALVINGS) if promised > 0 else ():
        moved = log_softmax(scores + size * score_direction)
        after = problem.objective(coefficients + size * direction, moved)
        if after >= before + _ARMIJO * size * promised - rounding:
            return size * direction, promised / 2
    return np.zeros_like(direction), 0.0


def _newton_direction(
    problem: SoftmaxProblem,
    row_mass: Array,
    probabilities: Array,
    gradient: Array,
    tolerance: float,
) -> Array:
    """Return the solution [D, C] of (damping − Hessian) direction = gradient.

    It is found by conjugate gradients, up to the relative error ``tolerance``, so that the Hessian
    needs no memory. The preconditioner is the inverse of its blocks of one class each, or of its
    diagonal where the design is wide. The damping bounds the step where no row has any curvature
    left.
    """
    design = problem.design
    mass = row_mass * probabilities
    ridge = problem.penalty + _DAMPING * (design**2).T @ row_mass[:, 0]
    # A column of zeros under no ridge has a gradient of 0: any value will do for it.
    added = np.where(ridge > 0, ridge, 1.0)
    curvatures = mass * (1 - probabilities)

    def curved(flat: Array) -> Array:
        vector = flat.reshape(gradient.shape)
        scores = design @ vector
        scores -= sum_of_choices(probabilities * scores)
        return (design.T @ (mass * scores) + ridge[:, None] * vector).ravel()

    if len(ridge) > _MAX_BLOCK_COLUMNS:
        inverses = 1 / ((design**2).T @ curvatures + added[:, None])
    else:
        blocks = [(design.T * of_class) @ design + np.diag(added) for of_class in curvatures.T]
        inverses = np.linalg.inv(blocks)

    def preconditioned(flat: Array) -> Array:
        vector = flat.reshape(gradient.shape)
        if inverses.ndim == 2:
            return centred(inverses * vector).ravel()
        return centred(np.einsum("cde,ec->dc", inverses, vector)).ravel()

    shape = gradient.size, gradient.size
    solution, _ = cg(
        LinearOperator(shape, curved),
        gradient.ravel(),
        rtol=tolerance,
        maxiter=_MAX_CG_STEPS,
        M=LinearOperator(shape, preconditioned),
    )
    direction: Array = solution.reshape(gradient.shape)
    return direction
