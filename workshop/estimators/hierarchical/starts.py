"""Starts of hierarchical mixtures, of two kinds.

A start by pieces finds few pieces that interlock: a tree grown from its root takes a wrong first
cut where two pieces look alike together. So the rows are cut into more regions than there are
experts, regions of the same linear piece are merged, a few iterations without levels make the
pieces clean, and the pieces are joined, level by level, into groups that a gate can tell apart.

A start by cells costs next to nothing and leaves the pieces to EM, which finds better trees from it
where there are more experts than pieces: rows belong to the nearest of some rows, level by level.

Dimension letters: N rows, F features, D columns of the design, O outputs, E experts, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from workshop.estimators.em import Array, least_squares
from workshop.estimators.hierarchical.tree import Rows, Tree, empty_gates, fit_tree
from workshop.estimators.iterative import Limits

REGIONS_PER_EXPERT = 4
NUM_CUTS = 16
"""The random cuts among which the best is taken."""
RIDGE = 0.01
"""The ridge of the regressions that find the pieces."""
_TIE = 1e-9
_FLAT = Limits(max_iter=30, tol=1e-4, n_iter_no_change=2)
_SOFTNESS = 0.05


def random_start(
    tree: Tree, rows: Rows, branching: Sequence[int], rng: np.random.Generator, by_cells: bool
) -> Array:
    """Return posteriors [N, E] to start a tree without coefficients from, by cells or by pieces.

    The order of ``rows`` counts: a fit sorts and merges them, so that its starts depend on the
    weighted distribution of its data alone.
    """
    if math.prod(branching) == 1:
        return np.ones((len(rows.weight), 1))
    if by_cells:
        return _softened(_cells(rows, branching, rng))
    return _softened(_pieces(tree, rows, branching, rng))


def _cells(rows: Rows, branching: Sequence[int], rng: np.random.Generator) -> Array:
    """Return membership [N, E] of the cells around some rows, cut again level by level."""
    features = rows.design[:, :-1]
    cell = np.zeros(len(features), dtype=np.intp)
    for level, choices in enumerate(branching):
        inner = np.zeros_like(cell)
        for number in range(math.prod(branching[:level])):
            members = np.flatnonzero(cell == number)
            if len(members):
                inner[members] = _nearest(features[members], rows.weight[members], choices, rng)
        cell = choices * cell + inner
    membership: Array = np.eye(math.prod(branching))[cell]
    return membership


def _nearest(features: Array, weight: Array, count: int, rng: np.random.Generator) -> Array:
    """Return the number of the nearest of ``count`` rows, which are drawn by weight, for each row.

    The rows drawn differ; there are fewer where fewer rows do.
    """
    least, nearest = np.full(len(features), np.inf), np.zeros(len(features), dtype=np.intp)
    for number, place in enumerate(rng.random(count)):
        total = np.cumsum(weight * (least > 0))
        if total[-1] <= 0:
            break
        chosen = min(int(np.searchsorted(total, place * total[-1], "right")), len(total) - 1)
        squares = ((features - features[chosen]) ** 2).sum(axis=1)
        is_nearer = squares < least
        nearest[is_nearer], least[is_nearer] = number, squares[is_nearer]
    return nearest


def _pieces(tree: Tree, rows: Rows, branching: Sequence[int], rng: np.random.Generator) -> Array:
    """Return posteriors [N, E] of linear pieces, in an order that the gates can tell apart."""
    num_experts, num_columns = math.prod(branching), rows.design.shape[1]
    penalty = np.full(num_columns, RIDGE)
    centred = Rows(rows.design, rows.targets - rows.weight @ rows.targets / rows.mass, rows.weight)
    # A region has on average at least twice the weight that the design has columns.
    enough = min(REGIONS_PER_EXPERT * num_experts, int(rows.mass / (2 * len(penalty))))
    regions = _regions(centred, max(enough, num_experts), penalty, rng)
    pieces = _softened(_merged(centred, regions, num_experts, penalty))
    flat = Tree(empty_gates((num_experts,), num_columns), tree.leaves, tree.penalty, 1)
    posteriors = fit_tree(flat, rows, _FLAT, pieces).last.expectation(rows)[0]
    return posteriors[:, grouped(rows, posteriors, branching, penalty, rng)]


def _softened(posteriors: Array) -> Array:
    """Return posteriors none of which is 0, so that a wrong piece can be left again."""
    return (1 - _SOFTNESS) * posteriors + _SOFTNESS / posteriors.shape[1]


def _regions(rows: Rows, count: int, penalty: Array, rng: np.random.Generator) -> list[Array]:
    """Return regions, row numbers each: the costliest is cut in two until there are ``count``.

    ``penalty`` [D] is the ridge of a region's regression. There are fewer regions where too few
    rows differ.
    """
    regions, costs = [np.arange(len(rows.weight))], [1.0]
    while len(regions) < count and max(costs) > -np.inf:
        place = int(np.argmax(costs))
        sides = _cut(rows.of(regions[place]), penalty, rng)
        if sides is None:
            costs[place] = -np.inf
            continue
        parts = [regions[place][side] for side in sides]
        regions[place : place + 1] = parts
        costs[place : place + 1] = [_cost(rows.of(part), penalty) for part in parts]
    return regions


def _squares(rows: Rows, row_weight: Array, penalty: Array) -> tuple[Array, Array]:
    """Return the residuals [G, N, O] of G regressions and their sums of squares [G]."""
    coefficients = least_squares(rows.design, rows.targets, row_weight, penalty)
    residuals = rows.targets - rows.design @ coefficients
    return residuals, np.einsum("ng,gno->g", row_weight, residuals**2)


def _cost(rows: Rows, penalty: Array) -> float:
    """Return the sum of squared residuals of a region: what a cut can lower."""
    return float(_squares(rows, rows.weight[:, None], penalty)[1][0])


def _cut(rows: Rows, penalty: Array, rng: np.random.Generator) -> tuple[Array, Array] | None:
    """Return the rows of the two sides of the best of some random cuts.

    ``None`` where no cut has rows on both sides, as where all rows are the same.
    """
    places = rows.design[:, :-1] @ _directions(rows, penalty, rng)
    levels = rng.uniform(0.2, 0.8, NUM_CUTS)
    sides = places <= _quantiles(places, rows.weight, levels)
    both = np.hstack([sides, ~sides])
    _, squares = _squares(rows, rows.weight[:, None] * both, penalty)
    costs = squares.reshape(2, NUM_CUTS).sum(axis=0)
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


def _directions(rows: Rows, penalty: Array, rng: np.random.Generator) -> Array:
    """Return unit directions [F, K] to cut along: axes, random ones, principal Hessian directions.

    Along principal Hessian directions (Li 1992) the regression surface bends: they are eigenvectors
    of Σ residual · x xᵀ, drawn by the size of their eigenvalues.
    """
    features = rows.design[:, :-1]
    num_features = features.shape[1]
    directions = rng.standard_normal((num_features, NUM_CUTS))
    num_axes = NUM_CUTS // 4
    directions[:, :num_axes] = np.eye(num_features)[:, rng.integers(num_features, size=num_axes)]
    residuals = _squares(rows, rows.weight[:, None], penalty)[0][0]
    centred = features - rows.weight @ features / rows.mass
    for cut in range(num_axes, num_axes + NUM_CUTS // 2):
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


def _merged(rows: Rows, regions: list[Array], num_pieces: int, penalty: Array) -> Array:
    """Return membership [N, P] of pieces: pairs of regions are merged where it costs least.

    The cost of a pair is the growth of the sum of squared residuals of a regression for both
    instead of one for each.
    """
    moments = np.stack([_moments(rows.of(region)) for region in regions])
    squares = _squares_of(moments, penalty)
    growth = np.full((len(regions), len(regions)), np.inf)
    for region in range(len(regions) - 1):
        others = slice(region + 1, None)
        joint = _squares_of(moments[region] + moments[others], penalty)
        growth[region, others] = joint - squares[region] - squares[others]
    owner = np.arange(len(regions))
    for _ in range(len(regions) - num_pieces):
        kept, gone = divmod(int(growth.argmin()), len(regions))
        owner[owner == gone] = kept
        moments[kept] += moments[gone]
        growth[gone], growth[:, gone] = np.inf, np.inf
        left = np.setdiff1d(np.unique(owner), [kept])
        squares[kept] = _squares_of(moments[kept][None], penalty)[0]
        joint = _squares_of(moments[kept] + moments[left], penalty)
        joint += -squares[kept] - squares[left]
        growth[np.minimum(kept, left), np.maximum(kept, left)] = joint
    numbers = np.searchsorted(np.unique(owner), owner)
    pieces = np.zeros((len(rows.weight), num_pieces), dtype=bool)
    for members, number in zip(regions, numbers, strict=True):
        pieces[members, number] = True
    return pieces


def _moments(rows: Rows) -> Array:
    """Return the second moments [D + O, D + O] of design and targets together."""
    both = np.hstack([rows.design, rows.targets])
    return (both.T * rows.weight) @ both


def _squares_of(moments: Array, penalty: Array) -> Array:
    """Return the sums of squared residuals and penalties [G] of ridge regressions."""
    num_columns = len(penalty)
    normal = moments[:, :num_columns, :num_columns] + np.diag(penalty)
    cross = moments[:, :num_columns, num_columns:]
    explained = np.einsum("gdo,gdo->g", cross, np.linalg.solve(normal, cross))
    return np.einsum("goo->g", moments[:, num_columns:, num_columns:]) - explained


_MAX_GROUPINGS = 500


def grouped(
    rows: Rows,
    pieces: Array,
    branching: Sequence[int],
    penalty: Array,
    rng: np.random.Generator,
) -> Array:
    """Return the order of ``pieces`` [N, E] as leaves of a tree, numbers [E].

    From the root down, pieces are grouped so that linear regressions tell the groups from each
    other best.
    """
    return np.array(_ordered(rows, pieces, list(range(pieces.shape[1])), branching, penalty, rng))


def _ordered(
    rows: Rows,
    pieces: Array,
    numbers: list[int],
    branching: Sequence[int],
    penalty: Array,
    rng: np.random.Generator,
) -> list[int]:
    if len(branching) <= 1:
        return numbers
    below = pieces[:, numbers]
    weight = rows.weight * below.sum(axis=1)
    coefficients = least_squares(rows.design, below, weight[:, None], penalty)[0]
    unexplained = (below.T * weight) @ (below - rows.design @ coefficients)
    mean = weight @ below / max(weight.sum(), np.finfo(np.float64).tiny)
    total = (below.T * weight) @ (below - mean)
    best = min(
        _groupings(len(numbers), branching[0], rng),
        key=lambda groups: _confusion(groups, unexplained, total),
    )
    order: list[int] = []
    for group in best:
        members = [numbers[place] for place in group]
        order += _ordered(rows, pieces, members, branching[1:], penalty, rng)
    return order


def _confusion(groups: Sequence[Sequence[int]], unexplained: Array, total: Array) -> float:
    """Return the sum over the groups of the unexplained share of their indicator's variance."""
    shares = 0.0
    for group in groups:
        square = np.ix_(group, group)
        shares += unexplained[square].sum() / max(total[square].sum(), 1e-300)
    return shares


def _groupings(
    num_pieces: int, num_groups: int, rng: np.random.Generator
) -> Iterator[list[list[int]]]:
    """Yield ways to part pieces into groups of one size: all of them, or many random ones."""
    size = num_pieces // num_groups
    count = math.factorial(num_pieces) // (math.factorial(size) ** num_groups)
    if count // math.factorial(num_groups) <= _MAX_GROUPINGS:
        yield from _all_groupings(list(range(num_pieces)), size)
        return
    for _ in range(_MAX_GROUPINGS):
        order = rng.permutation(num_pieces).tolist()
        yield [order[start : start + size] for start in range(0, num_pieces, size)]


def _all_groupings(numbers: list[int], size: int) -> Iterator[list[list[int]]]:
    if not numbers:
        yield []
        return
    first, rest = numbers[0], numbers[1:]
    for others in combinations(rest, size - 1):
        left = [number for number in rest if number not in others]
        for groups in _all_groupings(left, size):
            yield [[first, *others], *groups]
