"""Starts of EM, its runs, and the choice among mixtures by out-of-fold loss.

Dimension letters: N rows, E experts, W values of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from router.workshop.mixture.general.ensemble import EnsembleEM
from router.workshop.mixture.general.fits import Data, FitFailedError
from router.workshop.mixture.general.folds import Fold
from router.workshop.mixture.parts import Array, FittedMixture
from router.workshop.mixture.scale import Scale

TRIAL_ITERATIONS = 5
"""The iterations of EM after which the best of several starts goes on alone."""
UNSEEN_TRIAL_ITERATIONS = 2
"""The same where each iteration fits every expert to several folds."""
_NUM_KMEANS = 3
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
    starts: Sequence[Callable[[], EnsembleEM]],
    limits: Limits,
    held_out: Data | None,
    num_trial_iterations: int = TRIAL_ITERATIONS,
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
        for _ in range(min(num_trial_iterations, limits.max_iter)):
            score = em.step()
        if held_out is not None:
            score = score_of(em.mixture(limits.top_k), held_out)
        if best is None or score > best[0]:
            best = score, number, begun
    if best is None:
        assert error is not None  # at least one start was tried
        raise error
    return best[1:]


def score_of(mixture: FittedMixture, held_out: Data) -> float:
    """Return the mean log likelihood of rows held out, by weight."""
    densities = mixture.log_density(held_out.X, held_out.targets)
    return float(np.average(densities, weights=held_out.weights))


def losses_of(outputs: Array, data: Data) -> Array:
    """Return the loss [N] of a mixture's outputs [N, W]: a squared error, or 1 for a wrong class.

    Squares are relative to the variance of each output, and averaged over several.
    """
    if data.classes is not None:
        return (outputs.argmax(axis=1) != data.targets).astype(np.float64)
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


def is_better(losses: Array, than: Array, data: Data) -> bool:
    """Return whether the mean of ``losses`` [N] is less by more than a standard error.

    The error is that of the mean difference, by weight. Equal rows of equal targets count once in
    it, so that a weight is worth as many copies.
    """
    differences = than - losses
    gain = float(np.average(differences, weights=data.weights))
    variance = float(np.average((differences - gain) ** 2, weights=data.weights))
    num_distinct = len(np.unique(np.column_stack([data.X, data.targets]), axis=0))
    return gain > (variance / num_distinct) ** 0.5 + _ROUNDING


def first_shares(
    data: Data, num_experts: int, source: np.random.RandomState, is_plain: bool
) -> Array:
    """Return the shares [N, E] of a first division: k-means of the scaled rows.

    Unless it ``is_plain``, features count by random weights, and so do the targets of a regression.
    Equal rows count as one of their weights' sum, so that a weight is worth as many repetitions.
    """
    columns = data.X
    if not is_plain and data.classes is None:
        columns = np.column_stack([data.X, data.targets])
    distinct, places = np.unique(columns, axis=0, return_inverse=True)
    places = places.reshape(-1)
    if len(distinct) <= num_experts:
        return np.eye(num_experts)[places]
    scaled = Scale.of(columns, data.weights)(distinct)
    if not is_plain:
        scaled = scaled * source.exponential(size=scaled.shape[1])
    kmeans = KMeans(num_experts, n_init=_NUM_KMEANS, random_state=source.randint(2**31 - 1))
    labels = kmeans.fit_predict(scaled, sample_weight=np.bincount(places, data.weights))
    shares: Array = np.eye(num_experts)[labels[places]]
    return shares
