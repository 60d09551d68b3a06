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

from workshop.estimators.em import Array, Rows, least_squares
from workshop.estimators.hierarchical.tree import Tree, empty_gates, fit_tree
from workshop.estimators.iterative import Limits
from workshop.estimators.starts import regions

REGIONS_PER_EXPERT = 4
NUM_CUTS = 16
"""The random cuts among which the best is taken."""
RIDGE = 0.01
"""The ridge of the regressions that find the pieces."""
_FLAT = Limits(max_iter=30, tol=1e-4, n_iter_no_change=2)
_SOFTNESS = 0.05


def random_start(
    tree: Tree, rows: Rows, branching: Sequence[int], rng: np.random.Generator, by_cells: bool
) -> Array:
    """Return posteriors [N, E] to start a tree without coefficients from, by cells or by pieces.

    The order of ``rows`` counts: a fit sorts and merges them, so that its starts depend only on
    the weighted distribution of its data.
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
    found = regions(centred, max(enough, num_experts), penalty, NUM_CUTS, rng)
    pieces = _softened(_merged(centred, found, num_experts, penalty))
    flat = Tree(empty_gates((num_experts,), num_columns), tree.leaves, tree.penalty, 1)
    posteriors = fit_tree(flat, rows, _FLAT, pieces).last.expectation(rows)[0]
    return posteriors[:, grouped(rows, posteriors, branching, penalty, rng)]


def _softened(posteriors: Array) -> Array:
    """Return posteriors none of which is 0, so that a wrong piece can be left again."""
    return (1 - _SOFTNESS) * posteriors + _SOFTNESS / posteriors.shape[1]


def _merged(rows: Rows, parts: list[Array], num_pieces: int, penalty: Array) -> Array:
    """Return membership [N, P] of pieces: pairs of regions are merged where it costs least.

    The cost of a pair is the growth of the sum of squared residuals of a regression for both
    instead of one for each.
    """
    moments = np.stack([_moments(rows.of(region)) for region in parts])
    squares = _squares_of(moments, penalty)
    growth = np.full((len(parts), len(parts)), np.inf)
    for region in range(len(parts) - 1):
        others = slice(region + 1, None)
        joint = _squares_of(moments[region] + moments[others], penalty)
        growth[region, others] = joint - squares[region] - squares[others]
    owner = np.arange(len(parts))
    for _ in range(len(parts) - num_pieces):
        kept, gone = divmod(int(growth.argmin()), len(parts))
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
    for members, number in zip(parts, numbers, strict=True):
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
