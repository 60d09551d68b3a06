"""How many actors of a pool the load asks for: pure decisions, with the caller's clock.

A pool is to be busy for a share of its time, and frames are to wait no longer than so long. More
actors come once that was exceeded for a while without a pause, fewer go once fewer would have been
enough all through a longer while; between the two nothing changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from cluster.spec import ActorReport, ScalingTargets

SIGNAL_S = 2.0
"""Over so long busy time and queue time are averaged."""
HYSTERESIS = 0.1
"""By this part of the target fewer actors must be below it, or they would soon be more again."""
QUEUE_HYSTERESIS = 0.5
"""While frames wait longer than this part of their target, no actor goes."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What a pool's actors did lately.

    ``busy_devices`` is the busy share of all devices added up, so how many would be enough that
    never rest; ``queue_s`` how long a frame waited on average in the actor where they wait longest.
    """

    busy_devices: float
    queue_s: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A number of actors, and the words for why."""

    actors: int
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A wish for more or fewer actors that is not old enough yet.

    ``wanted`` is the smallest change of all since ``since_s``.
    """

    since_s: float
    wanted: Wanted


def wanted_actors(targets: ScalingTargets, num_actors: int, signals: Signals) -> Wanted:
    """Return how many actors there should be by the signals alone, within the bounds."""
    busy = signals.busy_devices / num_actors
    told = f"busy {busy:.0%} (target {targets.target_busy:.0%})"
    queue = f"frames wait {1000 * signals.queue_s:.1f} ms ({1000 * targets.target_queue_s:.1f})"
    more = _ceil(signals.busy_devices / targets.target_busy)
    fewer = _ceil(signals.busy_devices / (targets.target_busy * (1 - HYSTERESIS)))
    if signals.queue_s > targets.target_queue_s:
        more = max(more, num_actors + 1)
    elif signals.queue_s > QUEUE_HYSTERESIS * targets.target_queue_s:
        fewer = max(fewer, num_actors)
    wanted = more if more > num_actors else min(fewer, num_actors)
    bounded = targets.bounded(wanted)
    if bounded != wanted:
        told += f", would be {wanted} actors"
    return Wanted(bounded, f"{told}, {queue}")


def wanted_standby(targets: ScalingTargets, num_actors: int) -> int:
    """Return how many more actors are to be started and hold nothing, beside those in use."""
    if targets.dry_run:
        return 0
    return max(0, min(targets.standby_actors, targets.max_actors - num_actors))


def _ceil(number: float) -> int:
    return max(math.ceil(number - 1e-9), 0)


class ScalingPolicy:
    """One pool's decisions, one after the other."""

    def __init__(self, targets: ScalingTargets) -> None:
        """Nothing is waited for yet."""
        self.targets = targets
        self._waiting: Waiting | None = None

    def decide(self, num_actors: int, signals: Signals | None, now_s: float) -> Wanted | None:
        """Return the number of actors to go to, or ``None`` to stay.

        Where the number is out of bounds that is at once; without signals nothing else happens, and
        what was waited for is forgotten. Of all that was wanted during a delay the smallest change
        is made.
        """
        bounded = self.targets.bounded(num_actors)
        if bounded != num_actors:
            self._waiting = None
            return Wanted(bounded, f"{num_actors} actors are out of bounds")
        wanted = None if signals is None else wanted_actors(self.targets, num_actors, signals)
        if wanted is None or wanted.actors == num_actors:
            self._waiting = None
            return None
        self._waiting = waiting = _still(self._waiting, wanted, num_actors, now_s)
        is_up = wanted.actors > num_actors
        delay_s = self.targets.upscale_delay_s if is_up else self.targets.downscale_delay_s
        if now_s - waiting.since_s < delay_s:
            return None
        self._waiting = None
        return replace(waiting.wanted, reason=f"{waiting.wanted.reason}, for {delay_s:g} s")


def _still(before: Waiting | None, wanted: Wanted, num_actors: int, now_s: float) -> Waiting:
    """Return the wish of now with that of before, if both are for more, or both for fewer."""
    if before is None or (before.wanted.actors > num_actors) != (wanted.actors > num_actors):
        return Waiting(now_s, wanted)
    is_smaller = abs(wanted.actors - num_actors) < abs(before.wanted.actors - num_actors)
    return replace(before, wanted=wanted) if is_smaller else before


class BusyMeter:
    """Busy time and queue time of actors over the last :data:`SIGNAL_S`, from their counters."""

    def __init__(self) -> None:
        """No report has come yet."""
        self._reports: dict[str, deque[tuple[float, ActorReport]]] = {}

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's report; counters of an earlier generation are forgotten."""
        kept = self._reports.setdefault(report.actor_id, deque())
        if kept and kept[-1][1].generation != report.generation:
            kept.clear()
        kept.append((now_s, report))
        while len(kept) > 2 and kept[1][0] <= now_s - SIGNAL_S:
            kept.popleft()

    def forget(self, actor_id: str) -> None:
        """Drop an actor that is gone."""
        self._reports.pop(actor_id, None)

    def restart(self) -> None:
        """Forget what came before now, since the number of actors or their experts changed."""
        self._reports.clear()

    def signals(self, actor_ids: Collection[str]) -> Signals | None:
        """Return what these actors did; ``None`` while one of them has not been heard of twice."""
        busy_devices = queue_s = 0.0
        for actor_id in actor_ids:
            kept = self._reports.get(actor_id)
            if kept is None or len(kept) < 2:
                return None
            (first_s, first), (last_s, last) = kept[0], kept[-1]
            busy_devices += min((last.busy_s - first.busy_s) / (last_s - first_s), 1.0)
            if last.frames > first.frames:
                waited_s = (last.waited_s - first.waited_s) / (last.frames - first.frames)
                queue_s = max(queue_s, waited_s)
        return Signals(busy_devices, queue_s)
