"""Chooses the copy of each expert that a router asks: less loaded copies, on actors that answer.

An expert's rows of one layer all go to the same copy. A row's bits depend on the rows that share
its matrix product, so dividing the rows would make tokens depend on the copies. Nothing here waits
or sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

AVOID_S = 10.0
"""How long an actor that failed is avoided, unless a new generation of it comes first. A hung actor
is replaced sooner; an actor that was merely slow is tried again."""
DECAY = 0.9
"""The share of an actor's recent rows that still counts one layer later."""


class Copies:
    """A router's record of its actors: the recent rows of each, and the actors that failed."""

    def __init__(self) -> None:
        """Start without any actor."""
        self._recent_rows: dict[str, float] = {}
        self._avoided: dict[str, tuple[int, float]] = {}

    def avoid(self, actor_id: str, generation: int, now_s: float) -> None:
        """Note that this generation of an actor did not answer."""
        self._avoided[actor_id] = (generation, now_s + AVOID_S)

    def avoided(self, generations: Mapping[str, int], now_s: float) -> frozenset[str]:
        """Return the actors that failed lately and still have the generation that failed."""
        return frozenset(
            actor_id
            for actor_id, (generation, until_s) in self._avoided.items()
            if generations.get(actor_id) == generation and now_s < until_s
        )

    def choose(
        self, copies: Sequence[tuple[str, ...]], counts: Sequence[int], shunned: Collection[str]
    ) -> list[str | None]:
        """Return the actor for each expert of a layer, ``None`` where there is no copy.

        ``copies`` are the actors that hold each expert, ``counts`` the rows of each expert now. A
        ``shunned`` actor is chosen only for an expert that no other actor holds.
        """
        chosen, rows = choose_copies(copies, counts, self._recent_rows, shunned)
        recent = self._recent_rows
        self._recent_rows = {
            actor_id: DECAY * recent.get(actor_id, 0.0) + rows.get(actor_id, 0)
            for actor_id in recent.keys() | rows.keys()
        }
        return chosen


def choose_copies(
    copies: Sequence[tuple[str, ...]],
    counts: Sequence[int],
    recent_rows: Mapping[str, float],
    shunned: Collection[str],
) -> tuple[list[str | None], dict[str, int]]:
    """Choose a copy of each expert so that the busiest actor of the layer gets few rows.

    Experts with a single copy come first, then experts with many rows. Each goes to the actor with
    the fewest rows of this layer; among equal actors, to the actor with the fewest ``recent_rows``,
    then with the first name. Returns the actors by expert, and the rows of each actor.
    """
    usable = [_usable(actors, shunned) for actors in copies]
    chosen: list[str | None] = [actors[0] if actors else None for actors in usable]
    expert_ids = [expert_id for expert_id, count in enumerate(counts) if count]
    expert_ids.sort(key=lambda e: (len(usable[e]) > 1, -counts[e], e))
    rows: Counter[str] = Counter()
    for expert_id in expert_ids:
        if usable[expert_id]:
            actor_id = min(
                usable[expert_id], key=lambda a: (rows.get(a, 0), recent_rows.get(a, 0.0), a)
            )
            chosen[expert_id] = actor_id
            rows[actor_id] += counts[expert_id]
    return chosen, rows


def has_other_copies(
    copies: Sequence[tuple[str, ...]],
    expert_ids: Sequence[int],
    actor_id: str,
    shunned: Collection[str],
) -> bool:
    """Return whether each expert has a copy on an actor that is neither this nor ``shunned``."""
    return all(
        any(holder != actor_id and holder not in shunned for holder in copies[expert_id])
        for expert_id in expert_ids
    )


def _usable(actors: tuple[str, ...], shunned: Collection[str]) -> tuple[str, ...]:
    if not shunned or len(actors) < 2:
        return actors
    return tuple(actor_id for actor_id in actors if actor_id not in shunned) or actors
