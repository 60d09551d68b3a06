"""A seeded schedule of faults: a pure function, so that a run can be had again."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

JITTER = 0.3
"""How far a fault may lie from its place, as a share of the time between two."""
PAUSE_S = (0.5, 8.0)
"""Shorter and longer than what the controller takes for a hang."""


class Kind(enum.StrEnum):
    """What is done to which part."""

    KILL_ACTOR = "kill actor"
    PAUSE_ACTOR = "stop and continue actor"
    KILL_ROUTER = "kill router"
    KILL_CONTROLLER = "kill controller"
    REDEPLOY = "redeploy other weights"


BAG = (Kind.KILL_ACTOR, Kind.PAUSE_ACTOR, Kind.KILL_ROUTER, Kind.KILL_CONTROLLER, Kind.KILL_ACTOR)
"""What every five faults in a row are, in some order."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: ``at_s`` after the start, to the ``choice``-th (modulo their number) that lives.

    ``pause_s`` is how long a stopped process stays so; 0 where nothing is stopped.
    """

    at_s: float
    kind: Kind
    choice: int
    pause_s: float


WITH_REDEPLOY = (*BAG, Kind.REDEPLOY)


def schedule(
    seed: int, duration_s: float, every_s: float, kinds: Sequence[Kind] = BAG
) -> tuple[Fault, ...]:
    """Return the faults of a run, one in every ``every_s``, none in the last of them.

    Kinds come as from a bag: as many in a row as there are ``kinds`` hold all of them.
    """
    source = random.Random(seed)
    faults: list[Fault] = []
    bag: list[Kind] = []
    for place in range(1, int(duration_s / every_s)):
        bag = bag or source.sample(kinds, len(kinds))
        kind = bag.pop()
        at_s = (place + source.uniform(-JITTER, JITTER)) * every_s
        pause_s = source.uniform(*PAUSE_S) if kind is Kind.PAUSE_ACTOR else 0.0
        faults.append(Fault(at_s, kind, source.randrange(1 << 16), pause_s))
    return tuple(faults)
