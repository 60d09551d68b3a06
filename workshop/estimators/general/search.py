"""Starts of EM, its runs, and the choice among mixtures by out-of-fold loss.

Dimension letters: N rows, E experts, W values of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workshop.estimators.ascent import Ascent, Limits
from workshop.estimators.general.ensemble import EnsembleEM
from workshop.estimators.general.fits import Data, FitFailedError
from workshop.estimators.general.folds import Fold
from workshop.estimators.parts import Array, FittedMixture

TRIAL_ITERATIONS = 5
"""The iterations of EM after which the best of several starts goes on alone."""
GATE_ITERATIONS = 3
"""The iterations of the gate alone that follow a start out of fold, before the first choice."""
_ROUNDING = 1e-9


Judge = Callable[[EnsembleEM], float]
"""Scores a state by rows held out."""


def run(
    em: EnsembleEM,
    step: Callable[[EnsembleEM], float],
    limits: Limits,
    judge: Judge | None = None,
    advance: Callable[[str], object] = lambda remark: None,
) -> Ascent[EnsembleEM]:
    """Do steps until the score stops rising.

    The score is the objective of EM, and the best state is then the last one; with a ``judge`` it
    is what this says.
    """
    ascent = Ascent(limits, em)
    while not ascent.is_over:
        objective = step(em)
        if judge is None:
            ascent.take(em, objective)
        else:
            score = judge(em)
            ascent.take(em.copied(), objective, score)
        advance(f"log likelihood {objective:.6g}")
    return ascent


def _begun(starts: Sequence[Callable[[], EnsembleEM]]) -> list[tuple[int, EnsembleEM]]:
    """Return the states that begin, with the numbers of their starts.

    A start that an expert cannot be fitted to is left out. Raises the first
    :class:`FitFailedError` if all of them fail.
    """
    begun, errors = [], []
    for number, start in enumerate(starts):
        try:
            begun.append((number, start()))
        except FitFailedError as error:
            errors.append(error)
    if not begun:
        raise errors[0]
    return begun


def best_start(
    starts: Sequence[Callable[[], EnsembleEM]], limits: Limits, judge: Judge | None
) -> EnsembleEM:
    """Return the state of the start that is best after a few iterations of EM, as it began.

    Of equal ones it is the first. Raises :class:`FitFailedError` if no start begins.
    """
    begun = [em for _, em in _begun(starts)]
    if len(starts) == 1:
        return begun[0]
    scores = []
    for em in begun:
        tried = em.copied()
        for _ in range(min(TRIAL_ITERATIONS, limits.max_iter)):
            score = tried.step()
        scores.append(score if judge is None else judge(tried))
    return begun[int(np.argmax(scores))]


def raced_start(starts: Sequence[Callable[[], EnsembleEM]]) -> tuple[int, EnsembleEM]:
    """Try starts with few fits; returns the best one's number, and its state after the trial.

    The two best by a few iterations of the gate alone do one of EM. Raises
    :class:`FitFailedError` if no start begins.
    """
    trials = []
    for number, em in _begun(starts):
        for _ in range(GATE_ITERATIONS):
            em.step_of_gate()
        trials.append((em.objective(), number, em))
    best = sorted(trials, key=lambda trial: -trial[0])[:2]
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
        outputs[test] = em.combined(test, fitted.best.gate())
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
