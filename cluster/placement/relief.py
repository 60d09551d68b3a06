"""Which experts to take from an actor whose memory has no room for its share, and who gets them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.placement.change import Change
from cluster.spec import ExpertKey


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """The room for experts of an actor that serves.

    ``memory`` names the memory that it takes them into, which other actors may share, and
    ``budget_bytes`` are left of its own budget.
    """

    actor_id: str
    node: str
    memory: str
    budget_bytes: float


def plan_relief(
    actor_id: str,
    missing_bytes: int,
    shares: Mapping[str, Sequence[ExpertKey]],
    expert_bytes: Mapping[str, int],
    rooms: Sequence[FreeMemory],
    free_bytes: Mapping[str, float],
    min_copies: int,
) -> tuple[Change, int]:
    """Return the change that frees ``missing_bytes`` or what others have room for, and how much.

    Copies beyond ``min_copies`` are dropped first. Each other expert goes to an actor without a
    copy, on a node without one where there is any, and there to the one with the most room.
    ``shares`` has the experts of each actor, ``expert_bytes`` is by model, ``free_bytes`` by
    memory. A memory keeps room for one more expert, since loading takes that for a moment.
    """
    copies = Counter(key for keys in shares.values() for key in keys)
    room_of = {room.actor_id: room for room in rooms}
    holders: dict[ExpertKey, list[str]] = {key: [] for key in shares[actor_id]}
    for other, keys in shares.items():
        for key in holders.keys() & set(keys):
            holders[key].append(other)
    budgets = {room.actor_id: room.budget_bytes for room in rooms}
    free, reserve_bytes = dict(free_bytes), max(expert_bytes.values())
    added: dict[str, list[ExpertKey]] = {}
    dropped: list[ExpertKey] = []
    freed_bytes = 0

    def room_bytes(other: str) -> float:
        return min(budgets[other], free[room_of[other].memory] - reserve_bytes)

    for key in sorted(shares[actor_id], key=lambda key: (copies[key] <= min_copies, key)):
        if freed_bytes >= missing_bytes:
            break
        size = expert_bytes[key.model]
        if copies[key] <= min_copies:
            takers = [r for r in budgets if r not in holders[key] and room_bytes(r) >= size]
            if not takers:
                continue
            nodes = {room_of[a].node for a in holders[key] if a in room_of}
            taker = max(takers, key=lambda a: (room_of[a].node not in nodes, room_bytes(a)))
            added.setdefault(taker, []).append(key)
            budgets[taker] -= size
            free[room_of[taker].memory] -= size
        dropped.append(key)
        freed_bytes += size
    return Change(added, {actor_id: dropped} if dropped else {}), freed_bytes
