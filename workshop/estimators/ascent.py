"""When a fit ends, and the records of its iterations. Every fit of mixtures uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class Limits:
    """When a fit ends: the estimators' parameters of these names."""

    max_iter: int
    tol: float
    n_iter_no_change: int


class Ascent(Generic[State]):
    """The iterations of a fit so far.

    ``best`` is the state of the best ``score``, ``last`` that of the latest iteration.
    ``objectives`` has a value for each iteration. So has ``scores`` if rows held out judge the
    fit in place of the objective.
    """

    def __init__(self, limits: Limits, first: State, score: float = -math.inf) -> None:
        """Begin at a state and its score."""
        self.best = self.last = first
        self.score = score
        self.objectives: list[float] = []
        self.scores: list[float] = []
        self._limits, self._waited = limits, 0

    def take(self, state: State, objective: float, score: float | None = None) -> None:
        """Take the result of an iteration; without a ``score`` the objective is it."""
        self.objectives.append(objective)
        if score is not None:
            self.scores.append(score)
        reached = objective if score is None else score
        self._waited = 0 if reached > self.score + self._limits.tol else self._waited + 1
        self.last = state
        if reached > self.score:
            self.best, self.score = state, reached

    @property
    def is_converged(self) -> bool:
        """Whether ``n_iter_no_change`` iterations in a row rose by less than ``tol``."""
        return self._waited >= self._limits.n_iter_no_change

    @property
    def is_over(self) -> bool:
        """Whether the fit ends."""
        return self.is_converged or len(self.objectives) >= self._limits.max_iter
