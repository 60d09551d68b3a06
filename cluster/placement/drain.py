"""Which actors to drain, and which copies an expert gains or loses by command."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from cluster.errors import InvalidRequestError
from cluster.placement.board import Device
from cluster.placement.change import Change
from cluster.spec import ExpertKey


def cheapest_to_drain(
    candidates: Sequence[str],
    number: int,
    shares: Mapping[str, Collection[ExpertKey]],
    expert_bytes: Mapping[str, int],
    min_copies: int,
    tokens_per_s: Mapping[str, float],
) -> list[str]:
    """Return the ``number`` candidates whose experts cost the fewest bytes to load elsewhere.

    An expert that still has ``min_copies`` without the candidate costs nothing. Of equal candidates
    the one with the least load comes first, then the last in order. ``expert_bytes`` are by model,
    ``tokens_per_s`` by actor.
    """
    copies = Counter(key for keys in shares.values() for key in keys)
    left, chosen = list(candidates), []

    def cost(actor_id: str) -> tuple[float, float, int]:
        keys = shares.get(actor_id, ())
        needed = sum(expert_bytes[key.model] for key in keys if copies[key] <= min_copies)
        return needed, tokens_per_s.get(actor_id, 0.0), -left.index(actor_id)

    for _ in range(number):
        actor_id = min(left, key=cost)
        left.remove(actor_id)
        chosen.append(actor_id)
        copies.subtract(shares.get(actor_id, ()))
    return chosen


def change_of_copies(
    keys: Sequence[ExpertKey],
    number: int,
    devices: Sequence[Device],
    shares: Mapping[str, Collection[ExpertKey]],
    free_bytes: Mapping[str, float],
    expert_bytes: int,
    tokens_per_s: Mapping[str, float] | None = None,
) -> Change:
    """Return the change that brings each of a model's experts ``keys`` to ``number`` copies.

    A copy is added on a node without one first, then where there is the least load. A copy is
    dropped from a node with another first, then where there is the most load. Without
    ``tokens_per_s`` the load of a device is the number of experts that it holds. Raises
    :class:`InvalidRequestError` where too few devices have room.
    """
    held = {device.actor_id: set(shares[device.actor_id]) for device in devices}
    free, added, dropped = dict(free_bytes), defaultdict(list), defaultdict(list)

    def load(device: Device) -> float:
        if tokens_per_s is None:
            return len(held[device.actor_id]) / device.speed
        return tokens_per_s.get(device.actor_id, 0.0) / device.speed

    for key in keys:
        holders = [device for device in devices if key in held[device.actor_id]]
        crowds = Counter(device.node for device in holders)
        while len(holders) < number:
            fit = [d for d in devices if d not in holders and free[d.actor_id] >= expert_bytes]
            if not fit:
                raise InvalidRequestError(
                    f"only {len(holders)} of {len(devices)} actors have room for it "
                    f"(given: {number})",
                    "copies",
                )
            best = min(fit, key=lambda d: (crowds[d.node], load(d), d.actor_id))
            holders.append(best)
            crowds[best.node] += 1
            free[best.actor_id] -= expert_bytes
            held[best.actor_id].add(key)
            added[best.actor_id].append(key)
        while len(holders) > number:
            worst = max(holders, key=lambda d: (crowds[d.node] > 1, load(d), d.actor_id))
            holders.remove(worst)
            crowds[worst.node] -= 1
            held[worst.actor_id].remove(key)
            dropped[worst.actor_id].append(key)
    return Change(added, dropped)
