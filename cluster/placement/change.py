"""Dividing a plan into changes that fit, since a copy comes before another goes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import UnavailableError
from cluster.placement.placement import Placement
from cluster.spec import ExpertKey


def batches(
    added: Mapping[str, Sequence[ExpertKey]],
    dropped: Mapping[str, Sequence[ExpertKey]],
    free_bytes: Mapping[str, float],
    expert_bytes: Mapping[str, int],
) -> list[Change]:
    """Return the changes of a plan, in order; each fits into what the ones before leave free.

    ``free_bytes`` are by actor, ``expert_bytes`` by model. An expert loses copies with the change
    that brings the last of its new ones. What finds no room, because nothing else that could give
    way goes, is left out.
    """
    free = dict(free_bytes)
    waiting = [(actor_id, key) for actor_id, keys in added.items() for key in keys]
    going = [(actor_id, key) for actor_id, keys in dropped.items() for key in keys]
    changes: list[Change] = []
    while waiting or going:
        coming: list[tuple[str, ExpertKey]] = []
        for actor_id, key in waiting:
            if free[actor_id] >= expert_bytes[key.model]:
                free[actor_id] -= expert_bytes[key.model]
                coming.append((actor_id, key))
        waiting = [one for one in waiting if one not in set(coming)]
        still_waits = Counter(key for _, key in waiting)
        leaving = [one for one in going if not still_waits[one[1]]]
        going = [one for one in going if still_waits[one[1]]]
        if not coming and not leaving:
            break
        for actor_id, key in leaving:
            free[actor_id] += expert_bytes[key.model]
        changes.append(Change(_by_actor(coming), _by_actor(leaving)))
    return changes


def _by_actor(copies: Sequence[tuple[str, ExpertKey]]) -> dict[str, list[ExpertKey]]:
    result: dict[str, list[ExpertKey]] = {}
    for actor_id, key in copies:
        result.setdefault(actor_id, []).append(key)
    return result


Shares = dict[str, list[ExpertKey]]


@dataclass(frozen=True, slots=True)
class Change:
    """Copies that come and copies that go, by actor."""

    added: Mapping[str, Sequence[ExpertKey]] = field(default_factory=dict)
    dropped: Mapping[str, Sequence[ExpertKey]] = field(default_factory=dict)

    def touched(self) -> set[ExpertKey]:
        """Return every expert that gets or loses a copy."""
        by_actor = (*self.added.values(), *self.dropped.values())
        return {key for keys in by_actor for key in keys}

    def on(self, shares: Shares) -> Shares:
        """Return the shares as they are after it."""
        after = {actor_id: list(keys) for actor_id, keys in shares.items()}
        for actor_id, keys in self.dropped.items():
            gone = set(keys)
            after[actor_id] = [key for key in after[actor_id] if key not in gone]
        for actor_id, keys in self.added.items():
            after[actor_id] = sorted({*after[actor_id], *keys})
        return after


def with_change(placement: Placement, change: Change) -> Placement:
    """Return the next version, in which the change is made; the dead hold nothing in it."""
    holders = dict(placement.holders)
    for actor_id, keys in change.added.items():
        for key in keys:
            if actor_id not in holders[key]:
                holders[key] = (*holders[key], actor_id)
    for actor_id, keys in change.dropped.items():
        for key in keys:
            holders[key] = tuple(a for a in holders[key] if a != actor_id)
    return Placement(placement.epoch, placement.version + 1, holders, placement.generations)


def refuse_losses(after: Placement, change: Change) -> None:
    lost = sorted(key for key in change.touched() if not after.holders[key])
    if lost:
        raise UnavailableError(
            f"refused: expert {lost[0].expert_id} of layer {lost[0].layer_id} would have no live "
            "copy",
            lost[0].model,
            1.0,
        )
