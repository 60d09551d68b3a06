"""Dividing a plan into changes that fit, since a copy comes before another goes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.controller.changes import Change
from cluster.placement.placement import ExpertKey


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
