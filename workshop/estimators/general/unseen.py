"""Starts and runs of EM, and the choice among mixtures by losses on rows not fitted to.

Dimension letters: N rows, E experts, W values of an output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from sklearn.exceptions import FitFailedWarning

from workshop.estimators.general.ensemble import EnsembleEM
from workshop.estimators.general.fits import Data, FitFailedError, Fold, merged
from workshop.estimators.iterative import Ascent, Limits
from workshop.estimators.parts import Array, FittedMixture, posterior
from workshop.estimators.starts import distinct

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


def gain_of(losses: Array, than: Array, data: Data) -> tuple[float, float]:
    """Return the mean by which losses [N] are less than others, by weight, and its standard error.

    Equal rows of equal targets count once in the error, so that a weight is worth as many copies.
    """
    differences = than - losses
    mean = float(np.average(differences, weights=data.weights))
    variance = float(np.average((differences - mean) ** 2, weights=data.weights))
    return mean, (variance / len(distinct(data.X, data.targets)[0])) ** 0.5


MEAN, STACKED, EM = "mean", "stacked", "EM"
"""The mixtures of experts that are fitted to all rows, with constant weights (Breiman 1996,
"Stacked regressions") and with a gate; and that of EM, with experts fitted to their shares."""
_GAIN_ERRORS = 2.0
"""The standard errors by which a gate, or EM, must be better than the simpler mixture."""
_FIRST_ITERATIONS = 2
_FOLDS_OF_EM = 5
"""The most folds that judge EM, each of which costs a run of it."""
_Start = Callable[[EnsembleEM], EnsembleEM]


class UnseenSearch:
    """Fits mixtures of the same experts, and takes the simplest that no other clearly beats.

    The first is one expert alone or the mean with constant weights, whichever has the least loss:
    the mean's weights are judged by rows that they were not fitted to, and this choice has the risk
    of the best candidate, up to a term that falls with the rows (van der Laan, Polley and Hubbard
    2007, "Super learner"). The gate over experts fitted to all rows, and EM, follow. They can bend
    more, so each takes the place of the one taken so far only where its loss is less by more than
    two standard errors. ``losses`` are the mean losses, by weight; ``chosen`` is the name of the
    mixture taken.

    The rows of a fold judge a mixture fitted to the other folds. EM is fitted to the other rows of
    one of at most five folds after another, and judged by all rows judged so far: it is out as soon
    as its gain, if it stays, will not be enough over all folds. It is in after the last fold only,
    as the rows of the first one choose its iterations. EM's loss is that of the rows judged.
    """

    def __init__(
        self,
        begun: EnsembleEM,
        data: Data,
        folds: Sequence[Fold],
        divisions: Sequence[Array],
        limits: Limits,
        run_em: Callable[[EnsembleEM, Limits], Ascent[EnsembleEM]],
    ) -> None:
        """Take a state that is not started, and the first shares [N, E] of EM's starts.

        ``run_em`` runs EM on all rows, where it wins.
        """
        self._begun, self._data, self._folds = begun, data, folds
        self._folds_of_em = merged(folds, _FOLDS_OF_EM)
        self._divisions, self._limits, self._run_em = divisions, limits, run_em
        self.losses: dict[str, float] = {}
        self.chosen = ""

    def best(self) -> Ascent[EnsembleEM]:
        """Return the run of the chosen mixture.

        Raises :class:`FitFailedError` where an expert cannot be fitted to all rows of some folds.
        """
        whole = self._begun.started(None)
        names = whole.names
        candidates: dict[str, _Start] = {
            f"{name} alone": partial(EnsembleEM.with_expert, number=number)
            for number, name in enumerate(names)
        }
        alone = list(candidates)
        if len(names) > 1:
            candidates |= {MEAN: EnsembleEM.with_mean, STACKED: EnsembleEM.with_gate}
        losses = {
            name: unseen_losses(start, whole, self._data, self._folds, self._limits)
            for name, start in candidates.items()
        }
        for name, of_mixture in losses.items():
            self.losses[name] = float(np.average(of_mixture, weights=self._data.weights))
        self.chosen = min(alone, key=lambda name: self.losses[name])
        for name, num_errors in ((MEAN, 0.0), (STACKED, _GAIN_ERRORS)):
            if name in losses:
                gain, error = gain_of(losses[name], losses[self.chosen], self._data)
                self.chosen = name if gain > num_errors * error + _ROUNDING else self.chosen
        if len(names) > 1:
            try:
                winner = self._winner(losses[self.chosen])
                if winner is not None:
                    mixture, num_iter = winner
                    X, targets = self._data.X, self._data.targets
                    likelihoods = mixture.log_likelihoods(X, targets)
                    em = self._begun.started(posterior(mixture.log_gates(X), likelihoods))
                    self.chosen = EM
                    return self._run_em(em, self._limited(max(num_iter, 1)))
            except FitFailedError as error:
                warnings.warn(f"{error}; EM is left out", FitFailedWarning, stacklevel=4)
        return run(candidates[self.chosen](whole), EnsembleEM.step_of_gate, self._limits)

    def _winner(self, losses: Array) -> tuple[FittedMixture, int] | None:
        """Return EM's mixture of the first fold's other rows and its iterations, where EM wins.

        ``losses`` [N] are those to beat.
        """
        data = self._data
        of_em, judged = np.empty(len(data.X)), np.empty(0, np.intp)
        first: tuple[FittedMixture, int] | None = None
        for fold in self._folds_of_em:
            if first is None:
                number, num_iter, mixture = self._best_of_other_rows(fold)
                first = mixture, num_iter
            else:
                em = self._started(fold, number)
                mixture = run(em, EnsembleEM.step, self._limited(num_iter + 1)).last.mixture()
            of_em[fold[1]] = self._judged(mixture, fold)
            judged = np.concatenate([judged, fold[1]])
            gain, error = gain_of(of_em[judged], losses[judged], data.of(judged))
            num_errors = _GAIN_ERRORS * (len(judged) / len(data.X)) ** 0.5
            is_promising = gain > num_errors * error + _ROUNDING
            if not is_promising:
                break
        self.losses[EM] = float(np.average(of_em[judged], weights=data.weights[judged]))
        return first if is_promising else None

    def _best_of_other_rows(self, fold: Fold) -> tuple[int, int, FittedMixture]:
        """Run EM on the other rows of a fold; returns its start, its iterations, its mixture.

        The best start of all runs for twice as many iterations again and again, until the loss of
        the fold's rows falls no more: the shares follow from the targets, so that EM of experts
        that can bend to any rows overfits with time.
        """
        starts = [partial(self._started, fold, place) for place in range(len(self._divisions) + 1)]
        number, em = raced_start(starts)
        best = em.mixture()
        least = self._mean_loss(best, fold)
        num_iter, after = 0, _FIRST_ITERATIONS
        while after <= self._limits.max_iter:
            ran = run(em, EnsembleEM.step, self._limited(after - num_iter))
            mixture = em.mixture()
            loss = self._mean_loss(mixture, fold)
            if loss >= least:
                break
            best, least, num_iter = mixture, loss, after
            if ran.is_converged:
                break
            after *= 2
        return number, num_iter, best

    def _started(self, fold: Fold, number: int) -> EnsembleEM:
        """Return EM of a fold's other rows, from a division or, at 0, from experts of all rows."""
        train = fold[0]
        em = self._begun.on(self._data.of(train), self._halves(fold))
        return em.started(self._divisions[number - 1][train] if number else None)

    def _judged(self, mixture: FittedMixture, fold: Fold) -> Array:
        test = self._data.of(fold[1])
        return losses_of(mixture.combine(test.X), test)

    def _mean_loss(self, mixture: FittedMixture, fold: Fold) -> float:
        return float(np.average(self._judged(mixture, fold), weights=self._data.weights[fold[1]]))

    def _limited(self, max_iter: int) -> Limits:
        return replace(self._limits, max_iter=min(max_iter, self._limits.max_iter))

    def _halves(self, fold: Fold) -> list[Fold]:
        """Return two folds of the other rows, for a judgement of EM that costs the fewest fits.

        There are none where there is only one other fold.
        """
        places = np.full(len(self._data.X), -1)
        places[fold[0]] = np.arange(len(fold[0]))
        others = [places[rows] for _, rows in self._folds_of_em if rows is not fold[1]]
        others = [rows[rows >= 0] for rows in others]
        middle = len(others) // 2
        if not middle:
            return []
        one, other = (np.sort(np.concatenate(part)) for part in (others[:middle], others[middle:]))
        return [(other, one), (one, other)]
