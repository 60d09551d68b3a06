"""The fit that the estimators of a hierarchical mixture have in common.

Dimension letters: N rows, D columns of the design, O outputs, E experts, L levels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.parallel import Parallel, delayed

from experts.mixture.spec import MAX_LEVELS
from router.workshop.mixture.base import MixtureEstimator, Targets, distinct, progress
from router.workshop.mixture.em import design_of, penalty_of
from router.workshop.mixture.hierarchical.leaves import Leaves
from router.workshop.mixture.hierarchical.parts import mixture_of, tree_of
from router.workshop.mixture.hierarchical.starts import random_start
from router.workshop.mixture.hierarchical.tree import (
    Fitted,
    Rows,
    Stopping,
    Tree,
    empty_gates,
    fit_tree,
)
from router.workshop.mixture.parts import Array
from router.workshop.mixture.scale import Scale

NEWTON_STEPS = 1
"""The Newton steps of an M step, from the coefficients of the M step before."""
MAX_SEED = 2**31 - 1
ABOVE_0 = [Interval(Real, 0, None, closed="neither")]
_AT_LEAST_1 = [Interval(Integral, 1, None, closed="left")]


class HierarchicalMixture(MixtureEstimator):
    """The parameters and the fit of both estimators, which document them."""

    log_likelihoods_: Array

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "branching": ["array-like"],
        "top_k": [*_AT_LEAST_1, "array-like", None],
        "ridge": ABOVE_0,
        "gate_ridge": ABOVE_0,
        "n_init": _AT_LEAST_1,
        "max_iter": _AT_LEAST_1,
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_iter_no_change": _AT_LEAST_1,
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "warm_start": ["boolean"],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        branching: tuple[int, ...] = (2, 2),
        *,
        top_k: int | tuple[int | None, ...] | None = None,
        ridge: float = 1.0,
        gate_ridge: float = 0.1,
        n_init: int = 5,
        max_iter: int = 200,
        tol: float = 1e-5,
        n_iter_no_change: int = 5,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.branching = branching
        self.top_k = top_k
        self.ridge = ridge
        self.gate_ridge = gate_ridge
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit gates and experts to rows ``X`` [N, F], their targets, and optional weights [N].

        Raises ``ValueError`` as scikit-learn does for data and parameters, and for fewer rows than
        experts; ``ArithmeticError`` where the objective falls by more than rounding. The estimator
        is then as before. Warns with ``ConvergenceWarning`` where ``max_iter`` ends the fit.
        """
        with self._as_before_on_failure():
            self._fit(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        self._validate_params()
        branching = self._branching()
        top_k = self._top_k(branching)
        is_warm = bool(self.warm_start) and hasattr(self, "mixture_")
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        num_experts = math.prod(branching)
        if len(X) < num_experts:
            raise ValueError(
                f"n_samples={len(X)} with a weight above 0 must be at least the number of experts, "
                f"{num_experts}, of branching={branching}"
            )
        random = check_random_state(self.random_state)
        used, held_out = self._split(targets, random)
        train = _merged(X[used], targets[used], weights[used])
        rows_scale = Scale.of(train[0], train[2])
        targets_scale = self._target_scale(train[1], train[2])

        def rows_of(X: Array, targets: Targets, weights: Array) -> Rows:
            values = self._fit_targets(targets, targets_scale)
            return Rows(design_of(rows_scale(X)), values, weights)

        rows, validation = rows_of(*train), None
        if held_out is not None:
            validation = rows_of(X[held_out], targets[held_out], weights[held_out])
        num_features = X.shape[1]
        tree = Tree(
            empty_gates(branching, num_features + 1),
            self._empty_leaves(
                num_experts,
                rows.targets.shape[1],
                penalty_of(num_features, self.ridge, self.ridge),
            ),
            penalty_of(num_features, self.gate_ridge, self.gate_ridge),
            NEWTON_STEPS,
        )
        stopping = Stopping(self.max_iter, self.tol, self.n_iter_no_change, validation)
        if is_warm:
            tree = tree_of(self.mixture_, tree, rows_scale, targets_scale)
            starts = [partial(fit_tree, tree, rows, stopping)]
        else:
            seeds = random.randint(MAX_SEED, size=1 if num_experts == 1 else self.n_init).tolist()
            starts = [
                partial(fit_from, tree, branching, seed, place % 2 == 1, rows, stopping)
                for place, seed in enumerate(seeds)
            ]
        # Every start is fitted to its end: the order of half-finished fits often turns.
        best = max(self._fit_all(starts), key=lambda fitted: fitted.score)  # of equal ones first
        mixture = mixture_of(best.best, rows_scale, targets_scale, top_k)
        self._set_fitted(mixture, X[used], targets[used], weights[used])
        shift = 0.0 if targets_scale is None else float(np.log(targets_scale.deviation).sum())
        self.log_likelihoods_ = np.array(best.objectives) - shift
        self.n_iter_ = len(best.objectives)
        scores = None if held_out is None else np.array(best.held_out) - shift
        self._set_records(validation_scores_=scores)
        if not best.is_converged(stopping):
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _fit_all(self, fits: Sequence[Callable[..., Fitted]]) -> list[Fitted]:
        """Return the results of all fits, made here or in ``n_jobs`` processes."""
        name = type(self).__name__
        if len(fits) == 1 or self.n_jobs in (None, 1):
            with progress(self.verbose, len(fits) * self.max_iter, name) as advance:
                return [
                    fit(advance=lambda objective: advance(f"objective {objective:.6g}"))
                    for fit in fits
                ]
        done = []
        with progress(self.verbose, len(fits), name) as advance:
            results = Parallel(n_jobs=self.n_jobs, return_as="generator")(
                delayed(fit)() for fit in fits
            )
            for fitted in results:
                done.append(fitted)
                advance(f"objective {fitted.objectives[-1]:.6g}")
        return done

    def _branching(self) -> tuple[int, ...]:
        """Return the branching; raises ``ValueError`` for one that is no tree to serve."""
        branching = tuple(self.branching)
        if any(not isinstance(choices, Integral) or choices < 1 for choices in branching):
            raise ValueError(f"branching must be integers of at least 1 (given: {branching})")
        if not 1 <= len(branching) <= MAX_LEVELS:
            raise ValueError(
                f"branching must have from 1 to {MAX_LEVELS} levels (given: {len(branching)})"
            )
        return tuple(map(int, branching))

    def _top_k(self, branching: tuple[int, ...]) -> tuple[int | None, ...]:
        """Return the choices to keep at each level; raises ``ValueError`` where they do not fit."""
        if self.top_k is None or isinstance(self.top_k, Integral):
            # One number is for all levels, also for those with fewer choices.
            return tuple(
                None if self.top_k is None or self.top_k >= choices else int(self.top_k)
                for choices in branching
            )
        assert not isinstance(self.top_k, int)
        top_k = tuple(self.top_k)
        if len(top_k) != len(branching):
            raise ValueError(f"top_k={top_k} must have one number for each of {branching}")
        for kept, choices in zip(top_k, branching, strict=True):
            if kept is not None and (not isinstance(kept, Integral) or not 1 <= kept <= choices):
                raise ValueError(
                    f"top_k={top_k} must be integers from 1 to the choices {branching}, or None"
                )
        return tuple(None if kept is None else int(kept) for kept in top_k)

    def _target_scale(self, targets: Targets, weights: Array) -> Scale | None:
        """Return the scale of a regression's targets."""
        raise NotImplementedError

    def _fit_targets(self, targets: Targets, scale: Scale | None) -> Array:
        """Return the targets [N, O] that the experts are fitted to."""
        raise NotImplementedError

    def _empty_leaves(self, num_experts: int, num_outputs: int, penalty: Array) -> Leaves:
        """Return experts without rows."""
        raise NotImplementedError


def _merged(X: Array, targets: Targets, weights: Array) -> tuple[Array, Targets, Array]:
    """Return the different rows in ascending order, with the sums of their weights.

    Equal data in another order, or with repetitions in place of weights, give the same bits. A fit
    needs no less: EM enlarges rounding, and another start could then be the best.
    """
    first, numbers = distinct(X, targets)
    totals = np.zeros(len(first))
    by_weight = np.argsort(weights)  # a sum of fractions depends on their order
    np.add.at(totals, numbers[by_weight], weights[by_weight])
    return X[first], targets[first], totals


def fit_from(
    tree: Tree,
    branching: Sequence[int],
    seed: int,
    by_cells: bool,
    rows: Rows,
    stopping: Stopping,
    advance: Callable[[float], object] = lambda objective: None,
) -> Fitted:
    """Fit a tree from the random start of a seed."""
    posteriors = random_start(tree, rows, branching, np.random.default_rng(seed), by_cells)
    return fit_tree(tree, rows, stopping, posteriors, advance)
