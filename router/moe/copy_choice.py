"""Which copy of each expert a router asks: the less loaded one, and none that failed it lately.

An expert's rows of one layer all go to the same copy. A row's bits depend on the rows that share
its product, so dividing them would let a token depend on the copies. Nothing here waits or sends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

AVOID_S = 10.0
"""How long an actor that failed is avoided, if no other generation of it comes first. A hung one is
replaced sooner; one that was merely slow is tried again."""
FORGET = 0.9
"""The share of an actor's recent rows that still counts a layer later."""


class Copies:
    """One router's knowledge of its actors: how many rows each got lately, and which failed."""

    def __init__(self) -> None:
        """Begin without any."""
        self._recent_rows: dict[str, float] = {}
        self._avoided: dict[str, tuple[int, float]] = {}

    def avoid(self, actor_id: str, generation: int, now_s: float) -> None:
        """Note that this generation of an actor gave no answer."""
        self._avoided[actor_id] = (generation, now_s + AVOID_S)

    def avoided(self, generations: Mapping[str, int], now_s: float) -> frozenset[str]:
        """Return the actors that failed lately, in the generation that ``generations`` has."""
        return frozenset(
            actor_id
            for actor_id, (generation, until_s) in self._avoided.items()
            if generations.get(actor_id) == generation and now_s < until_s
        )

    def choose(
        self, copies: Sequence[tuple[str, ...]], counts: Sequence[int], shunned: Collection[str]
    ) -> list[str | None]:
        """Return the actor for each expert of a layer, ``None`` where there is no copy.

        ``copies`` has the actors that hold each expert and ``counts`` the rows that each gets now.
        One that is ``shunned`` is chosen only where an expert has no other.
        """
        chosen, rows = choose_copies(copies, counts, self._recent_rows, shunned)
        recent = self._recent_rows
        self._recent_rows = {
            actor_id: FORGET * recent.get(actor_id, 0.0) + rows.get(actor_id, 0)
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

    Experts that leave no choice go first, then those with many rows, each to the actor with the
    fewest rows of this layer, then with the fewest ``recent_rows``, then with the first name.
    Returns the actors by expert, and the rows of each actor.
    """
    usable = [_usable(actors, shunned) for actors in copies]
    chosen: list[str | None] = [actors[0] if actors else None for actors in usable]
    asked = [expert_id for expert_id, count in enumerate(counts) if count and usable[expert_id]]
    asked.sort(key=lambda expert_id: (len(usable[expert_id]) > 1, -counts[expert_id], expert_id))
    rows: dict[str, int] = {}
    for expert_id in asked:
        actor_id = min(
            usable[expert_id], key=lambda one: (rows.get(one, 0), recent_rows.get(one, 0.0), one)
        )
        chosen[expert_id] = actor_id
        rows[actor_id] = rows.get(actor_id, 0) + counts[expert_id]
    return chosen, rows


def has_other_copies(
    copies: Sequence[tuple[str, ...]],
    expert_ids: Sequence[int],
    actor_id: str,
    shunned: Collection[str],
) -> bool:
    """Tell whether each of these experts has a copy elsewhere that is not ``shunned``."""
    return all(
        any(one != actor_id and one not in shunned for one in copies[expert_id])
        for expert_id in expert_ids
    )


def _usable(actors: tuple[str, ...], shunned: Collection[str]) -> tuple[str, ...]:
    if not shunned or len(actors) < 2:
        return actors
    return tuple(one for one in actors if one not in shunned) or actors
