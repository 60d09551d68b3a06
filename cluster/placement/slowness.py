"""Which actors are slow compared with the rest of their pool, by the times that routers measure.

Twins are the actors of a pool: their devices are to be alike. An actor is slow once it takes
:data:`SLOW` times as long as its twins for :data:`SURE_S`, and until it is well below that for
longer, so that a noisy measurement moves no experts to and fro. The clock is the caller's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median, median_low

SLOW, RECOVERED = 3.0, 2.0
"""The times of its pool from which an actor is slow, and below which it has recovered."""
SURE_S = 5.0
"""How long an actor is slow before it counts as such."""
RECOVERY_S = 30.0
"""How long it must not be slow before it counts as recovered."""
UNKNOWN_S = 600.0
"""How long a slow actor may go unmeasured before it gets experts again."""
CHANGED = 1.5
"""By how much a slow actor's time must change before experts move for it once more."""

Actor = tuple[str, int]
"""An actor's id and generation."""


def beside_twins(
    reports: Iterable[Mapping[Actor, float]],
    kinds: Mapping[str, str],
    generations: Mapping[str, int],
) -> dict[str, float]:
    """Return how many times as long as the rest of its pool each measured actor takes.

    ``reports`` has each router's times, in any unit. ``kinds`` has the pool of each actor,
    ``generations`` the living ones. The twins' time is their median, and that of several routers
    is the median of what each measures. An actor without a measured twin is left out.
    """
    by_actor: defaultdict[str, list[float]] = defaultdict(list)
    for report in reports:
        living = {a: times for (a, g), times in report.items() if generations.get(a) == g}
        for actor_id, times in living.items():
            kind = kinds.get(actor_id)
            twins = [t for a, t in living.items() if a != actor_id and kinds.get(a) == kind]
            if kind is not None and twins:
                by_actor[actor_id].append(times / median_low(twins))
    return {actor_id: median(times) for actor_id, times in by_actor.items()}


class SlowActors:
    """The actors that are slow, from one look at the measurements to the next.

    ``slowness`` has the newest measurement of each actor, ``slow`` those that count as slow, with
    the number of times by which experts are spread. The second changes seldom.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.slowness: Mapping[str, float] = {}
        self.slow: dict[str, float] = {}
        self._since_s: dict[str, float] = {}
        """Since when a measurement contradicts ``slow``."""
        self._measured_at_s: dict[str, float] = {}
        self._generation: dict[str, int] = {}

    def look(
        self, slowness: Mapping[str, float], living: Mapping[str, int], now_s: float
    ) -> tuple[list[str], list[str]]:
        """Take the newest measurements; returns the actors newly slow, and slow no longer.

        ``living`` has the generations of the living actors; a successor begins anew.
        """
        self.slowness = slowness
        self._measured_at_s |= dict.fromkeys(slowness, now_s)
        known = self.slow.keys() | slowness.keys()
        self._since_s = {
            actor_id: self._since_s.get(actor_id, now_s)
            for actor_id in known
            if self._is_other(actor_id)
        }
        came, went = [], []
        for actor_id in sorted(known):
            lasted_s = now_s - self._since_s.get(actor_id, math.inf)
            if actor_id not in self.slow:
                if lasted_s >= SURE_S:
                    came.append(actor_id)
                    self._generation[actor_id] = living[actor_id]
                    self._set(actor_id)
            elif self._is_over(actor_id, living, lasted_s, now_s):
                went.append(actor_id)
                del self.slow[actor_id]
            elif lasted_s >= SURE_S and self.slowness[actor_id] >= RECOVERED:
                self._set(actor_id)
        return came, went

    def _set(self, actor_id: str) -> None:
        self.slow[actor_id] = self.slowness[actor_id]
        self._since_s.pop(actor_id, None)

    def _is_other(self, actor_id: str) -> bool:
        """Return whether an actor's measurement is another than it counts for."""
        times, before = self.slowness.get(actor_id), self.slow.get(actor_id)
        if times is None:
            return False
        if before is None:
            return times >= SLOW
        return times < RECOVERED or not before / CHANGED < times < before * CHANGED

    def _is_over(
        self, actor_id: str, living: Mapping[str, int], lasted_s: float, now_s: float
    ) -> bool:
        times = self.slowness.get(actor_id)
        if living.get(actor_id) != self._generation[actor_id]:
            return True
        if times is None:
            return now_s - self._measured_at_s[actor_id] >= UNKNOWN_S
        return times < RECOVERED and lasted_s >= RECOVERY_S
