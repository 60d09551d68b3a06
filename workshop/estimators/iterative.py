"""What all families of mixtures have in common: parameters, the fit, when it ends, its records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Generic, Self, TypeVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.parallel import Parallel, delayed

from workshop.estimators.base import MixtureEstimator, progress
from workshop.estimators.parts import Array

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


MAX_SEED = 2**31 - 1
AT_LEAST_1 = Interval(Integral, 1, None, closed="left")
AT_LEAST_0 = Interval(Real, 0, None, closed="left")
ABOVE_0 = Interval(Real, 0, None, closed="neither")


def parameter(default: Any, *allowed: Any, by_keyword: bool = True) -> Any:
    """Return a dataclass field: a parameter's default, and the values that scikit-learn accepts."""
    return field(default=default, kw_only=by_keyword, metadata={"allowed": list(allowed)})


@dataclass(eq=False, repr=False)
class IterativeMixture(MixtureEstimator):
    """A mixture that is fitted step by step from one or more starts.

    Subclasses are dataclasses too: a field is a parameter, and one of the same name changes the
    default.
    """

    n_init: int = parameter(3, AT_LEAST_1)
    max_iter: int = parameter(200, AT_LEAST_1)
    tol: float = parameter(1e-5, AT_LEAST_0)
    n_iter_no_change: int = parameter(5, AT_LEAST_1)
    early_stopping: bool = parameter(False, "boolean")
    validation_fraction: float = parameter(0.1, Interval(Real, 0, 1, closed="neither"))
    warm_start: bool = parameter(False, "boolean")
    n_jobs: int | None = parameter(None, Integral, None)
    random_state: Any = parameter(None, "random_state")
    verbose: int = parameter(0, "verbose")

    @property
    def _parameter_constraints(self) -> dict[str, list[Any]]:
        return {one.name: one.metadata["allowed"] for one in fields(self)}

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit gates and experts to rows ``X`` [N, F], their targets, and optional weights [N].

        Recurrent experts take rows [N, T, F]; sequences of several lengths are a list of N arrays
        [T, F].

        Raises ``ValueError`` as scikit-learn does for data and parameters, for fewer rows than
        experts, and, as :class:`workshop.estimators.general.fits.FitFailedError`, which names
        the expert, for one that cannot be fitted to its first rows; :class:`NotFiniteError` for a
        loss that becomes NaN or infinite; ``ArithmeticError`` if the objective of a hierarchical
        mixture falls by more than rounding. The estimator is then as before. Warns
        :class:`FitFailedWarning` for an expert that cannot be fitted later, and
        :class:`ConvergenceWarning` if ``max_iter`` ends the fit.
        """
        with self._as_before_on_failure():
            self._validate_params()
            is_warm = bool(self.warm_start) and hasattr(self, "mixture_")
            self._fit(X, y, sample_weight, is_warm, check_random_state(self.random_state))
        return self

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, is_warm: bool, random: np.random.RandomState
    ) -> None:
        """Fit, from the fitted mixture if ``is_warm``, and set the attributes."""
        raise NotImplementedError

    @property
    def _limits(self) -> Limits:
        return Limits(self.max_iter, self.tol, self.n_iter_no_change)

    def _best_of(self, fits: Sequence[Callable[..., Any]]) -> Any:
        """Return the result of the greatest ``score``, of equal ones the first.

        The ``fits``, of which each takes a function ``advance``, run here or in ``n_jobs``
        processes.
        """
        name = type(self).__name__
        if len(fits) == 1 or self.n_jobs in (None, 1):
            with progress(self.verbose, len(fits) * self.max_iter, name) as advance:
                return max([fit(advance=advance) for fit in fits], key=lambda done: done.score)
        results = []
        with progress(self.verbose, len(fits), name) as advance:
            jobs = Parallel(n_jobs=self.n_jobs, return_as="generator")
            for done in jobs(delayed(fit)() for fit in fits):
                results.append(done)
                advance(f"objective {done.score:.6g}")
        return max(results, key=lambda done: done.score)

    def _set_run(self, log_likelihoods: Array, scores: Array | None, warning: str | None) -> None:
        """Set the records of the iterations; warn of a fit that ``max_iter`` ended."""
        self.log_likelihoods_ = log_likelihoods
        self.n_iter_ = len(log_likelihoods)
        self._set_records(validation_scores_=scores)
        if warning is not None:
            warnings.warn(warning, ConvergenceWarning, stacklevel=4)
