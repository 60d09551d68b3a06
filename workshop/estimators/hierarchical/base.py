"""The fit that the estimators of a hierarchical mixture have in common.

Dimension letters: N rows, D columns of the design, O outputs, E experts, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np

from experts.mixture.spec import MAX_LEVELS
from workshop.estimators.base import Targets
from workshop.estimators.em import Rows, design_of, penalty_of
from workshop.estimators.hierarchical.parts import mixture_of, tree_of
from workshop.estimators.hierarchical.starts import random_start
from workshop.estimators.hierarchical.tree import Leaves, Tree, empty_gates, fit_tree
from workshop.estimators.iterative import (
    ABOVE_0,
    AT_LEAST_1,
    MAX_SEED,
    Ascent,
    IterativeMixture,
    Limits,
    parameter,
)
from workshop.estimators.parts import Array
from workshop.estimators.scale import Scale, Scales
from workshop.estimators.starts import distinct

NEWTON_STEPS = 1
"""The Newton steps of an M step, from the coefficients of the M step before."""


@dataclass(eq=False, repr=False)
class HierarchicalMixture(IterativeMixture):
    """The parameters and the fit of both estimators, which document them."""

    branching: tuple[int, ...] = parameter((2, 2), "array-like", by_keyword=False)
    top_k: int | tuple[int | None, ...] | None = parameter(None, AT_LEAST_1, "array-like", None)
    ridge: float = parameter(1.0, ABOVE_0)
    gate_ridge: float = parameter(0.1, ABOVE_0)

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, is_warm: bool, random: np.random.RandomState
    ) -> None:
        branching = self._branching()
        top_k = self._top_k(branching)
        X, targets, weights = self._check_fit(X, y, sample_weight, reset=not is_warm)
        num_experts = math.prod(branching)
        if len(X) < num_experts:
            raise ValueError(
                f"n_samples={len(X)} with a weight above 0 must be at least the number of experts, "
                f"{num_experts}, of branching={branching}"
            )
        used, held_out = self._split(targets, random)
        train = _merged(X[used], targets[used], weights[used])
        scales = Scales(Scale.of(train[0], train[2]), self._target_scale(train[1], train[2]))

        def rows_of(X: Array, targets: Targets, weights: Array) -> Rows:
            values = self._fit_targets(targets, scales.targets)
            return Rows(design_of(scales.inputs(X)), values, weights)

        rows, validation = rows_of(*train), None
        if held_out is not None:
            validation = rows_of(X[held_out], targets[held_out], weights[held_out])
        num_features = X.shape[1]
        ridge = penalty_of(num_features, self.ridge, self.ridge)
        tree = Tree(
            empty_gates(branching, num_features + 1),
            self._empty_leaves(num_experts, ridge),
            penalty_of(num_features, self.gate_ridge, self.gate_ridge),
            NEWTON_STEPS,
        )
        limits, seeds = self._limits, [None]
        if is_warm:
            tree = tree_of(self.mixture_, tree, scales)
        else:
            seeds = random.randint(MAX_SEED, size=1 if num_experts == 1 else self.n_init).tolist()
        # Every start is fitted to its end: the order of half-finished fits often turns.
        ascent = self._best_of(
            [
                partial(fit_from, tree, branching, seed, place % 2 == 1, rows, limits, validation)
                for place, seed in enumerate(seeds)
            ]
        )
        mixture = mixture_of(ascent.best, scales, top_k)
        self._set_fitted(mixture, X[used], targets[used], weights[used])
        log_likelihoods = np.array(ascent.objectives) - scales.log_units
        scores = None if held_out is None else np.array(ascent.scores) - scales.log_units
        warning = f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol"
        self._set_run(log_likelihoods, scores, None if ascent.is_converged else warning)

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

    def _fit_targets(self, targets: Targets, scale: Scale) -> Array:
        """Return the targets [N, O] that the experts are fitted to."""
        raise NotImplementedError

    def _empty_leaves(self, num_experts: int, penalty: Array) -> Leaves:
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
    seed: int | None,
    by_cells: bool,
    rows: Rows,
    limits: Limits,
    validation: Rows | None,
    advance: Callable[[str], object] = lambda remark: None,
) -> Ascent[Tree]:
    """Fit a tree from the random start of a seed; without one, as it is."""
    posteriors = None
    if seed is not None:
        posteriors = random_start(tree, rows, branching, np.random.default_rng(seed), by_cells)
    return fit_tree(tree, rows, limits, posteriors, validation, advance)
