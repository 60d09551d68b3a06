"""The order of pieces under a tree: each gate's choices are groups that a gate can tell apart.

Dimension letters: N rows, D columns of the design, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from workshop.estimators.choices import Array
from workshop.estimators.em import least_squares
from workshop.estimators.hierarchical.tree import Rows

_MOST_GROUPINGS = 500


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
    if count // math.factorial(num_groups) <= _MOST_GROUPINGS:
        yield from _all_groupings(list(range(num_pieces)), size)
        return
    for _ in range(_MOST_GROUPINGS):
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
