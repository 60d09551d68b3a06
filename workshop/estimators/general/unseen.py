"""The choice among mixtures by their losses on rows that they were not fitted to.

Dimension letters: N rows, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from sklearn.exceptions import FitFailedWarning

from workshop.estimators.ascent import Ascent, Limits
from workshop.estimators.general.ensemble import EnsembleEM
from workshop.estimators.general.fits import Data, FitFailedError
from workshop.estimators.general.folds import Fold, merged
from workshop.estimators.general.search import (
    Gain,
    losses_of,
    raced_start,
    run,
    unseen_losses,
)
from workshop.estimators.parts import Array, FittedMixture, posterior

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
        whole = self._begun.copied()
        whole.start_whole()
        candidates: dict[str, _Start] = {
            f"{name} alone": partial(EnsembleEM.with_expert, number=number)
            for number, name in enumerate(whole.names)
        }
        alone = list(candidates)
        if whole.num_experts > 1:
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
                gain = Gain.of(losses[name], losses[self.chosen], self._data)
                self.chosen = name if gain.exceeds(num_errors) else self.chosen
        if whole.num_experts > 1:
            try:
                winner = self._winner(losses[self.chosen])
                if winner is not None:
                    mixture, num_iter = winner
                    em = self._begun.started(_posterior(mixture, self._data))
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
            gain = Gain.of(of_em[judged], losses[judged], data.of(judged))
            is_promising = gain.exceeds(_GAIN_ERRORS * (len(judged) / len(data.X)) ** 0.5)
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
        if number:
            return em.started(self._divisions[number - 1][train])
        em.start_whole()
        return em

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


def _posterior(mixture: FittedMixture, data: Data) -> Array:
    """Return the probability [N, E] of each expert, given a row and its target."""
    likelihoods = mixture.log_likelihoods(data.X, data.targets)
    return posterior(mixture.log_gates(data.X), likelihoods)
