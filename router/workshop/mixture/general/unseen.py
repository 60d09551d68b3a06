"""The choice among mixtures by their losses on rows that they were not fitted to.

Dimension letters: N rows, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from sklearn.exceptions import FitFailedWarning

from router.workshop.mixture.general.ensemble import EnsembleEM
from router.workshop.mixture.general.fits import Data, FitFailedError
from router.workshop.mixture.general.folds import Fold
from router.workshop.mixture.general.search import (
    UNSEEN_TRIAL_ITERATIONS,
    Limits,
    Run,
    best_start,
    is_better,
    losses_of,
    run,
    unseen_losses,
)
from router.workshop.mixture.parts import Array

MEAN, STACKED, EM = "mean", "stacked", "EM"
"""The mixtures of experts that are fitted to all rows, with constant weights (Breiman 1996,
"Stacked regressions") and with a gate; and that of EM, with experts fitted to their shares."""


class UnseenSearch:
    """Fits mixtures of the same experts, and takes the simplest that no other clearly beats.

    The first is the mean. Another takes its place where its loss is less by more than a standard
    error: each expert alone, the gate over experts fitted to all rows, and EM. ``losses`` are the
    mean losses, by weight; ``chosen`` is the name of the mixture taken.

    The rows of a fold judge a mixture fitted to the other folds. EM is judged by the rows of the
    first fold alone, and is fitted to all rows only where it wins there.
    """

    def __init__(
        self,
        begun: EnsembleEM,
        data: Data,
        folds: Sequence[Fold],
        divisions: Sequence[Array],
        limits: Limits,
        held_out: Data | None,
    ) -> None:
        """Take a state that is not started, and the first shares [N, E] of EM's starts."""
        self._begun, self._data, self._folds = begun, data, folds
        self._divisions, self._limits, self._held_out = divisions, limits, held_out
        self.losses: dict[str, float] = {}
        self.chosen = MEAN

    def best(self, run_em: Callable[[EnsembleEM], Run]) -> Run:
        """Return the run of the chosen mixture; ``run_em`` runs EM from a start.

        Raises :class:`FitFailedError` where an expert cannot be fitted to all rows of some folds.
        """
        whole = self._begun.copied()
        whole.start_whole()
        candidates: dict[str, Callable[[EnsembleEM], EnsembleEM]] = {MEAN: EnsembleEM.with_mean}
        if whole.num_experts > 1:
            for number, name in enumerate(whole.names):
                candidates[f"{name} alone"] = partial(EnsembleEM.with_expert, number=number)
            candidates[STACKED] = EnsembleEM.with_gate
        losses = {
            name: unseen_losses(start, whole, self._data, self._folds, self._limits)
            for name, start in candidates.items()
        }
        for name, of_mixture in losses.items():
            self.losses[name] = float(np.average(of_mixture, weights=self._data.weights))
        least = min(losses, key=lambda name: self.losses[name])
        if is_better(losses[least], losses[MEAN], self._data):
            self.chosen = least
        winner = self._winning_start(whole, losses[self.chosen]) if len(losses) > 1 else None
        if winner is not None:
            try:
                em = self._start_of_em(whole, winner)
            except FitFailedError as error:
                warnings.warn(f"{error}; EM is left out", FitFailedWarning, stacklevel=4)
            else:
                self.chosen = EM
                return run_em(em)
        return run(candidates[self.chosen](whole), EnsembleEM.step_of_gate, self._limits)

    def _start_of_em(self, whole: EnsembleEM, number: int) -> EnsembleEM:
        return whole if number == 0 else self._begun.started(self._divisions[number - 1])

    def _winning_start(self, whole: EnsembleEM, losses: Array) -> int | None:
        """Return the number of EM's best start, 0 for experts fitted to all rows.

        ``None`` where EM, fitted to the other folds, does not win on the rows of the first fold.
        """
        train, test = self._folds[0]
        data, judge = self._data.of(train), self._data.of(test)
        places = np.full(len(self._data.X), -1)
        places[train] = np.arange(len(train))
        # Two folds of the others: a judgement of EM that costs the fewest fits.
        others = [rows for _, rows in self._folds[1:]]
        half = len(others) // 2
        inner = []
        if half:
            halves = [places[np.concatenate(rows)] for rows in (others[:half], others[half:])]
            inner = [
                (np.sort(halves[1]), np.sort(halves[0])),
                (np.sort(halves[0]), np.sort(halves[1])),
            ]
        begun = self._begun.on(data, inner)

        def started_whole() -> EnsembleEM:
            em = begun.copied()
            em.start_whole()
            return em

        starts = [started_whole] + [
            partial(begun.started, shares[train]) for shares in self._divisions
        ]
        number, em = best_start(starts, self._limits, None, UNSEEN_TRIAL_ITERATIONS)
        mixture = run(em, EnsembleEM.step, self._limits).em.mixture()
        of_em = losses_of(mixture.combine(judge.X), judge)
        self.losses[EM] = float(np.average(of_em, weights=judge.weights))
        return number if is_better(of_em, losses[test], judge) else None
