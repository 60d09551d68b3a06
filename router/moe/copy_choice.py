"""Chooses the copy of each expert that a router asks: less loaded copies, on actors that answer.

An actor that failed is *avoided*: it is asked only for experts without a copy elsewhere. A part is
*replaceable* where actors that are not avoided hold copies of all its experts.

An expert's rows of one layer all go to the same copy. A row's bits depend on the rows that share
its matrix product, so dividing the rows would make tokens depend on the copies. Nothing here waits
or sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from types import MappingProxyType

import numpy as np

from cluster.placement.placement import Placement
from router.moe.pending import PendingLayer
from router.moe.permute import Layout, LayoutCache, Part, lay_out
from router.moe.shared_load import SharedLoad

AVOID_S = 10.0
"""How long an actor that failed is avoided, unless a new generation of it comes first. A hung actor
is replaced sooner; an actor that was merely slow is tried again."""
DECAY = 0.9
"""The share of an actor's recent rows that still counts one layer later."""
MOST_LAYOUTS = 256
NOTHING: Mapping[str, int] = MappingProxyType({})


class CopyChoice:
    """Chooses copies for one dispatcher; for layers with an expert that has several copies.

    It remembers the recent rows of each actor, and the actors that failed lately.
    """

    def __init__(
        self,
        layouts: LayoutCache,
        is_ready: Callable[[str, int], bool],
        shared: SharedLoad | None = None,
    ) -> None:
        """``is_ready`` returns whether an actor's generation has a connection.

        ``shared`` is the load by all dispatchers of a router that has several.
        """
        self._layouts = layouts
        self._is_ready = is_ready
        self._shared = shared
        self._recent_rows: dict[str, float] = {}
        self._laid_for: Placement | None = None
        self._laid: dict[tuple[str | None, ...], Layout] = {}
        self._failed: dict[str, tuple[int, float]] = {}
        """By actor: the generation that failed, and the end of its avoidance."""

    def note_failure(self, actor_id: str, generation: int, now_s: float) -> None:
        """Record that this generation of an actor did not answer."""
        self._failed[actor_id] = (generation, now_s + AVOID_S)

    def layout(
        self, placement: Placement, layer: PendingLayer, pairs: np.ndarray | None, now_s: float
    ) -> Layout:
        """Return a layer's layout for sending ``pairs``, with one copy of each expert."""
        holders = self._layouts.holders(placement, layer.layer_id)
        expert_ids = layer.expert_of_pair if pairs is None else layer.expert_of_pair[pairs]
        counts = np.bincount(expert_ids, minlength=len(holders)).tolist()
        avoided = self._avoided(placement, layer, now_s)
        chosen = self.choose(holders, counts, avoided | self._unready(placement, avoided))
        return self._laid_out(tuple(chosen), placement)

    def _laid_out(self, chosen: tuple[str | None, ...], placement: Placement) -> Layout:
        """Return the layout of chosen copies, which is kept, since choices recur."""
        if placement is not self._laid_for or len(self._laid) >= MOST_LAYOUTS:
            self._laid_for, self._laid = placement, {}
        layout = self._laid.get(chosen)
        if layout is None:
            holders = dict(enumerate(chosen))
            layout = self._laid[chosen] = lay_out(holders, placement.generations)
        return layout

    def replaceable(
        self, placement: Placement, layer: PendingLayer, parts: Sequence[Part], now_s: float
    ) -> Sequence[bool]:
        """Return for each part whether other actors, none of them avoided, hold its experts."""
        holders = self._layouts.holders(placement, layer.layer_id)
        avoided = self._avoided(placement, layer, now_s)
        return [is_replaceable(holders, part.expert_ids, part.actor_id, avoided) for part in parts]

    def failed_lately(self, generations: Mapping[str, int], now_s: float) -> frozenset[str]:
        """Return the actors that failed lately and still have the generation that failed."""
        return frozenset(
            actor_id
            for actor_id, (generation, until_s) in self._failed.items()
            if generations.get(actor_id) == generation and now_s < until_s
        )

    def choose(
        self, copies: Sequence[tuple[str, ...]], counts: Sequence[int], avoided: Collection[str]
    ) -> list[str | None]:
        """Return the actor for each expert of a layer, ``None`` where there is no copy.

        ``copies`` are the actors that hold each expert, ``counts`` the rows of each expert now. An
        ``avoided`` actor is chosen only for an expert that no other actor holds.
        """
        if self._shared is None:
            chosen, rows = choose_copies(copies, counts, self._recent_rows, avoided)
        else:
            owed, work = self._shared.owed(), self._shared.work(counts)
            chosen, rows = choose_copies(copies, work, self._recent_rows, avoided, owed)
            self._shared.sent(rows)
        recent = self._recent_rows
        self._recent_rows = {
            actor_id: DECAY * recent.get(actor_id, 0.0) + rows.get(actor_id, 0)
            for actor_id in recent.keys() | rows.keys()
        }
        return chosen

    def _avoided(self, placement: Placement, layer: PendingLayer, now_s: float) -> frozenset[str]:
        return self.failed_lately(placement.generations, now_s) | layer.failed_actors

    def _unready(self, placement: Placement, avoided: Set[str]) -> frozenset[str]:
        """Return the actors without a connection yet, except ``avoided`` actors."""
        return frozenset(
            actor_id
            for actor_id, generation in placement.generations.items()
            if actor_id not in avoided and not self._is_ready(actor_id, generation)
        )


def choose_copies(
    copies: Sequence[tuple[str, ...]],
    counts: Sequence[int],
    recent_rows: Mapping[str, float],
    avoided: Collection[str],
    owed: Mapping[str, int] = NOTHING,
) -> tuple[list[str | None], dict[str, int]]:
    """Choose a copy of each expert so that the busiest actor of the layer gets few rows.

    Experts with a single copy come first, then experts with many rows. Each goes to the actor with
    the fewest rows, of this layer and ``owed`` already; among equal actors, to the actor with the
    fewest ``recent_rows``, then with the first name. Returns the actors by expert, and the rows of
    each actor in this layer. In place of rows all numbers may be work
    (:class:`router.moe.shared_load.SharedLoad`).
    """
    usable = [_usable(actors, avoided) for actors in copies]
    chosen: list[str | None] = [actors[0] if actors else None for actors in usable]
    expert_ids = [expert_id for expert_id, count in enumerate(counts) if count]
    expert_ids.sort(key=lambda e: (len(usable[e]) > 1, -counts[e], e))
    rows: Counter[str] = Counter()
    for expert_id in expert_ids:
        if usable[expert_id]:
            actor_id = min(
                usable[expert_id],
                key=lambda a: (rows.get(a, 0) + owed.get(a, 0), recent_rows.get(a, 0.0), a),
            )
            chosen[expert_id] = actor_id
            rows[actor_id] += counts[expert_id]
    return chosen, rows


def is_replaceable(
    copies: Sequence[tuple[str, ...]],
    expert_ids: Sequence[int],
    actor_id: str,
    avoided: Collection[str],
) -> bool:
    """Return whether each expert has a copy on an actor that is neither this nor ``avoided``."""
    if not avoided:  # this actor is one of the holders
        return all(len(copies[expert_id]) > 1 for expert_id in expert_ids)
    return all(
        any(holder != actor_id and holder not in avoided for holder in copies[expert_id])
        for expert_id in expert_ids
    )


def _usable(actors: tuple[str, ...], avoided: Collection[str]) -> tuple[str, ...]:
    if not avoided or len(actors) < 2:
        return actors
    return tuple(actor_id for actor_id in actors if actor_id not in avoided) or actors
