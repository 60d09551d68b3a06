"""Regions of rows with one linear piece each, from which fits start.

Dimension letters: N rows, F features, D columns of a design, O outputs, K random cuts.
"""

from __future__ import annotations

import numpy as np

from workshop.estimators.em import Array, Rows, least_squares

_TIE = 1e-9


def distinct(X: Array, targets: Array) -> tuple[Array, Array]:
    """Return the places of the different pairs of a row and its target, in ascending order.

    The second result [N] is the number of each row's pair in that order.
    """
    columns = np.column_stack([X, targets])
    _, first, numbers = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    return first, numbers.reshape(-1)


def regions(
    rows: Rows, count: int, penalty: Array, num_cuts: int, rng: np.random.Generator
) -> list[Array]:
    """Return regions, row numbers each: the costliest is cut in two until there are ``count``.

    A cut is the best of ``num_cuts`` random ones: that of the least squares of two regressions with
    the ridge ``penalty`` [D]. There are fewer regions where too few rows differ.
    """
    found, costs = [np.arange(len(rows.weight))], [1.0]
    while len(found) < count and max(costs) > -np.inf:
        place = int(np.argmax(costs))
        sides = _cut(rows.of(found[place]), penalty, num_cuts, rng)
        if sides is None:
            costs[place] = -np.inf
            continue
        parts = [found[place][side] for side in sides]
        found[place : place + 1] = parts
        costs[place : place + 1] = [_cost(rows.of(part), penalty) for part in parts]
    return found


def _squares(rows: Rows, row_weight: Array, penalty: Array) -> tuple[Array, Array]:
    """Return the residuals [G, N, O] of G regressions and their sums of squares [G]."""
    coefficients = least_squares(rows.design, rows.targets, row_weight, penalty)
    residuals = rows.targets - rows.design @ coefficients
    return residuals, np.einsum("ng,gno->g", row_weight, residuals**2)


def _cost(rows: Rows, penalty: Array) -> float:
    """Return the sum of squared residuals of a region: what a cut can lower."""
    return float(_squares(rows, rows.weight[:, None], penalty)[1][0])


def _cut(
    rows: Rows, penalty: Array, num_cuts: int, rng: np.random.Generator
) -> tuple[Array, Array] | None:
    """Return the rows of the two sides of the best cut.

    ``None`` where no cut has rows on both sides, as where all rows are the same.
    """
    places = rows.design[:, :-1] @ _directions(rows, penalty, num_cuts, rng)
    levels = rng.uniform(0.2, 0.8, num_cuts)
    sides = places <= _quantiles(places, rows.weight, levels)
    both = np.hstack([sides, ~sides])
    _, squares = _squares(rows, rows.weight[:, None] * both, penalty)
    costs = squares.reshape(2, num_cuts).sum(axis=0)
    costs[sides.all(axis=0)] = np.inf
    best = int(costs.argmin())
    if costs[best] == np.inf:
        return None
    return np.flatnonzero(sides[:, best]), np.flatnonzero(~sides[:, best])


def _quantiles(places: Array, weight: Array, levels: Array) -> Array:
    """Return the weighted quantile of each column of ``places`` [N, K] at its own level."""
    found = np.empty(len(levels))
    for cut, level in enumerate(levels):
        order = np.argsort(places[:, cut], kind="stable")
        total = np.cumsum(weight[order])
        row = order[np.searchsorted(total, level * total[-1])]
        found[cut] = places[row, cut] + _TIE
    return found


def _directions(rows: Rows, penalty: Array, num_cuts: int, rng: np.random.Generator) -> Array:
    """Return unit directions [F, K] to cut along: axes, random ones, principal Hessian directions.

    Along principal Hessian directions (Li 1992) the regression surface bends: they are eigenvectors
    of Σ residual · x xᵀ, drawn by the size of their eigenvalues.
    """
    features = rows.design[:, :-1]
    num_features = features.shape[1]
    directions = rng.standard_normal((num_features, num_cuts))
    num_axes = num_cuts // 4
    directions[:, :num_axes] = np.eye(num_features)[:, rng.integers(num_features, size=num_axes)]
    residuals = _squares(rows, rows.weight[:, None], penalty)[0][0]
    centred = features - rows.weight @ features / rows.mass
    for cut in range(num_axes, num_axes + num_cuts // 2):
        mixed = rows.weight * (residuals @ rng.standard_normal(residuals.shape[1]))
        values, vectors = np.linalg.eigh((centred.T * mixed) @ centred)
        size = np.abs(values)
        uniform = rng.random()
        if size.sum() > 0:
            chosen = int(np.searchsorted(np.cumsum(size), uniform * size.sum()))
            vector = vectors[:, chosen]
            # The sign of an eigenvector is arbitrary.
            directions[:, cut] = vector * np.sign(vector[np.abs(vector).argmax()])
    return directions / np.linalg.norm(directions, axis=0)
