"""Starts of EM, its runs, and the choice among mixtures by out-of-fold loss.

Dimension letters: N rows, E experts, W values of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from router.workshop.mixture.general.ensemble import EnsembleEM
from router.workshop.mixture.general.fits import Data, FitFailedError
from router.workshop.mixture.general.folds import Fold
from router.workshop.mixture.parts import Array, FittedMixture

TRIAL_ITERATIONS = 5
"""The iterations of EM after which the best of several starts goes on alone."""
GATE_ITERATIONS = 3
"""The iterations of the gate alone that follow a start out of fold, before the first choice."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """When a run of EM ends: the estimator's parameters of these names."""

    max_iter: int
    tol: float
    n_iter_no_change: int
    top_k: int | None


@dataclass(frozen=True)
class Run:
    """A mixture fitted by some iterations of EM: the state to take, and the records.

    ``scores`` are those of rows held out, ``None`` without such rows.
    """

    em: EnsembleEM
    objectives: Array
    scores: Array | None
    is_converged: bool


def run(
    em: EnsembleEM,
    step: Callable[[EnsembleEM], float],
    limits: Limits,
    held_out: Data | None = None,
    advance: Callable[[str], None] = lambda remark: None,
) -> Run:
    """Do steps until the score stops rising; returns the last state, or that of best score.

    The score is the objective of EM, or the mean log likelihood of the rows held out.
    """
    objectives: list[float] = []
    scores: list[float] = []
    best, best_score, since_rise = em, -np.inf, 0
    while len(objectives) < limits.max_iter and since_rise < limits.n_iter_no_change:
        objectives.append(step(em))
        score = objectives[-1]
        if held_out is not None:
            score = score_of(em.mixture(limits.top_k), held_out)
            scores.append(score)
            best = em.copied() if score > best_score else best
        since_rise = 0 if score > best_score + limits.tol else since_rise + 1
        best_score = max(score, best_score)
        advance(f"log likelihood {score:.6g}")
    found = None if held_out is None else np.array(scores)
    is_converged = since_rise >= limits.n_iter_no_change
    return Run(best, np.array(objectives), found, is_converged)


def best_start(
    starts: Sequence[Callable[[], EnsembleEM]], limits: Limits, held_out: Data | None
) -> tuple[int, EnsembleEM]:
    """Try starts by a few iterations of EM; returns the best one's number, and its state as begun.

    The first of equal ones is the best. A start that an expert cannot be fitted to is left out.
    Raises the first :class:`FitFailedError` where that is so for all of them.
    """
    best: tuple[float, int, EnsembleEM] | None = None
    error: FitFailedError | None = None
    for number, start in enumerate(starts):
        try:
            begun = start()
        except FitFailedError as failure:
            error = error or failure
            continue
        if len(starts) == 1:
            return 0, begun
        em = begun.copied()
        for _ in range(min(TRIAL_ITERATIONS, limits.max_iter)):
            score = em.step()
        if held_out is not None:
            score = score_of(em.mixture(limits.top_k), held_out)
        if best is None or score > best[0]:
            best = score, number, begun
    if best is None:
        assert error is not None  # at least one start was tried
        raise error
    return best[1:]


def raced_start(starts: Sequence[Callable[[], EnsembleEM]]) -> tuple[int, EnsembleEM]:
    """Try starts with few fits; returns the best one's number, and its state after the trial.

    The two best by a few iterations of the gate alone do one of EM. A start that an expert cannot
    be fitted to is left out. Raises the first :class:`FitFailedError` where that is so for all.
    """
    begun: list[tuple[float, int, EnsembleEM]] = []
    error: FitFailedError | None = None
    for number, start in enumerate(starts):
        try:
            em = start()
        except FitFailedError as failure:
            error = error or failure
            continue
        for _ in range(GATE_ITERATIONS):
            em.step_of_gate()
        begun.append((em.objective(), number, em))
    if not begun:
        assert error is not None  # at least one start was tried
        raise error
    best = sorted(begun, key=lambda trial: -trial[0])[:2]
    if len(best) > 1:
        best = [(em.step(), number, em) for _, number, em in best]
    return max(best, key=lambda trial: trial[0])[1:]


def score_of(mixture: FittedMixture, held_out: Data) -> float:
    """Return the mean log likelihood of rows held out, by weight."""
    densities = mixture.log_density(held_out.X, held_out.targets)
    return float(np.average(densities, weights=held_out.weights))


def losses_of(outputs: Array, data: Data) -> Array:
    """Return the loss [N] of a mixture's outputs [N, W]: a squared error.

    Squares of a regression are relative to the variance of each output, and averaged over several.
    Those of a classification are of probabilities, and summed over the classes (Brier 1950,
    "Verification of forecasts expressed in terms of probability"). Wrong classes would be too few
    to tell mixtures apart: one row less is a difference of one standard error.
    """
    if data.classes is not None:
        of_classes: Array = ((outputs - np.eye(data.width)[data.targets]) ** 2).sum(axis=1)
        return of_classes
    mean = np.average(data.targets, axis=0, weights=data.weights)
    variance = np.average((data.targets - mean) ** 2, axis=0, weights=data.weights)
    squares = (outputs - data.targets) ** 2 / np.where(variance > 0, variance, 1.0)
    means: Array = squares.mean(axis=1)
    return means


def unseen_losses(
    start: Callable[[EnsembleEM], EnsembleEM],
    em: EnsembleEM,
    data: Data,
    folds: Sequence[Fold],
    limits: Limits,
) -> Array:
    """Return out-of-fold losses [N] of a gate over experts that stay.

    ``start`` makes a state begin with the gate. For each fold the gate is fitted to the others, to
    out-of-fold outputs of the experts.
    """
    outputs = np.empty((len(data.X), data.width))
    for train, test in folds:
        fitted = run(start(em.of(train)), EnsembleEM.step_of_gate, limits)
        outputs[test] = em.combined(test, fitted.em.gate())
    return losses_of(outputs, data)


@dataclass(frozen=True)
class Gain:
    """The mean by which some losses are less than others, by weight, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, losses: Array, than: Array, data: Data) -> Gain:
        """Compare losses [N] of the rows of ``data``.

        Equal rows of equal targets count once in the error, so that a weight is worth as many
        copies.
        """
        differences = than - losses
        mean = float(np.average(differences, weights=data.weights))
        variance = float(np.average((differences - mean) ** 2, weights=data.weights))
        num_distinct = len(np.unique(np.column_stack([data.X, data.targets]), axis=0))
        return cls(mean, (variance / num_distinct) ** 0.5)

    def exceeds(self, num_errors: float) -> bool:
        """Return whether the gain is more than some standard errors, beyond rounding."""
        return self.mean > num_errors * self.error + _ROUNDING
