"""Which actor computes which (token, expert) pairs of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from router.moe.permute import route


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a share of a layout; ``actor_id`` is ``None`` where its experts have no live copy."""

    actor_id: str | None
    generation: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One layer's experts in an order in which those of one holder stand together.

    ``expert_of`` [E] has the expert at each place, and ``ends`` where each holder's places end.
    """

    expert_of: np.ndarray
    ends: np.ndarray
    holders: tuple[Holder, ...]


class Part(NamedTuple):
    """The share of one actor in a layer: which pairs it computes, grouped by expert."""

    actor_id: str
    generation: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    pairs: np.ndarray


def lay_out(holders: Mapping[int, str | None], generations: Mapping[str, int]) -> Layout:
    """Order a layer's experts by holder, those without one first, then by id.

    ``holders`` has every expert of the layer.
    """
    expert_ids = sorted(holders, key=lambda expert_id: (holders[expert_id] or "", expert_id))
    sizes: Counter[str | None] = Counter()  # in the order of the experts
    for expert_id in expert_ids:
        sizes[holders[expert_id]] += 1
    return Layout(
        np.array(expert_ids, np.int64),
        np.cumsum(list(sizes.values()), dtype=np.int64),
        tuple(Holder(one, 0 if one is None else generations[one]) for one in sizes),
    )


def split(
    layout: Layout, expert_ids: np.ndarray, k: int, pairs: np.ndarray | None
) -> tuple[np.ndarray, list[Part], np.ndarray]:
    """Divide pairs among actors: by expert, then by rank, then by token.

    ``expert_ids`` [P] has the expert of every pair of the layer; ``pairs`` ascend, ``None`` is all
    of them. Returns the pairs that have an actor, in order; the parts, each a stretch of it; and
    those whose experts have no live copy.
    """
    ordered, shares = route(expert_ids, k, layout.expert_of, layout.ends, pairs)
    parts: list[Part] = []
    first = 0
    for holder, (asked_ids, counts, begin, end) in zip(layout.holders, shares, strict=True):
        if holder.actor_id is None:  # the first share, if there is such
            first = end
        elif asked_ids:
            asked = ordered[begin:end]
            parts.append(Part(holder.actor_id, holder.generation, asked_ids, counts, asked))
    return ordered[first:], parts, ordered[:first]
