"""A change of the placement, and how a plan is divided into changes that fit into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import UnavailableError
from cluster.placement.placement import Placement
from cluster.spec import ExpertKey, model_id_of

Shares = dict[str, list[ExpertKey]]
"""The experts that each actor is to hold."""


@dataclass(frozen=True, slots=True)
class Change:
    """Copies to add and copies to drop, by actor."""

    added: Mapping[str, Sequence[ExpertKey]] = field(default_factory=dict)
    dropped: Mapping[str, Sequence[ExpertKey]] = field(default_factory=dict)

    def touched(self) -> set[ExpertKey]:
        """Return every expert that gets or loses a copy."""
        by_actor = (*self.added.values(), *self.dropped.values())
        return {key for keys in by_actor for key in keys}

    def on(self, shares: Shares) -> Shares:
        """Return the shares after the change."""
        after = {actor_id: list(keys) for actor_id, keys in shares.items()}
        for actor_id, keys in self.dropped.items():
            gone = set(keys)
            after[actor_id] = [key for key in after[actor_id] if key not in gone]
        for actor_id, keys in self.added.items():
            after[actor_id] = sorted({*after[actor_id], *keys})
        return after


def with_change(placement: Placement, change: Change) -> Placement:
    """Return the next version of a placement, in which the change is made."""
    holders = dict(placement.holders)
    for actor_id, keys in change.added.items():
        for key in keys:
            if actor_id not in holders[key]:
                holders[key] = (*holders[key], actor_id)
    for actor_id, keys in change.dropped.items():
        for key in keys:
            holders[key] = tuple(a for a in holders[key] if a != actor_id)
    return Placement(placement.epoch, placement.version + 1, holders, placement.generations)


def refuse_losses(before: Placement, after: Placement, change: Change, min_copies: int) -> None:
    """Raise :class:`UnavailableError` where a change leaves an expert too few live copies.

    That is none, or fewer than ``min_copies`` and than ``before``: a twin has died meanwhile.
    """
    for key in sorted(change.touched()):
        copies, least = len(after.holders[key]), max(1, min(min_copies, len(before.holders[key])))
        if copies < least:
            raise UnavailableError(
                f"refused: expert {key.expert_id} of layer {key.layer_id} would have "
                f"{copies or 'no'} live {'copy' if copies < 2 else 'copies'} of {min_copies}",
                model_id_of(key.model),
                1.0,
            )


def batches(
    added: Mapping[str, Sequence[ExpertKey]],
    dropped: Mapping[str, Sequence[ExpertKey]],
    free_bytes: Mapping[str, float],
    expert_bytes: Mapping[str, int],
) -> list[Change]:
    """Divide a plan into changes, each of which fits into the memory that those before leave free.

    Within a change, copies are added before others are dropped. ``free_bytes`` are by actor,
    ``expert_bytes`` by model. An expert's copies are dropped with the change that adds the last of
    its new copies. Copies for which no room ever becomes free are left out.
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
        waiting = [copy for copy in waiting if copy not in set(coming)]
        still_waits = Counter(key for _, key in waiting)
        leaving = [(actor_id, key) for actor_id, key in going if not still_waits[key]]
        going = [(actor_id, key) for actor_id, key in going if still_waits[key]]
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
