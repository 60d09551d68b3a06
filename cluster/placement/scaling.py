"""How many actors of a pool the load asks for: pure decisions, with the caller's clock.

A pool is to be busy for a share of its time, and frames are to wait no longer than so long. More
actors come once that was exceeded for a while without a pause, fewer go once fewer would have been
enough all through a longer while; between the two nothing changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.spec import ActorReport, ScalingTargets

SIGNAL_S = 2.0
"""Over so long busy time and queue time are averaged."""
LATELY_S = 1.0
"""Over so long for more actors, which come only after their own delay: that is smoothing enough,
and a load that stepped up is seen a second sooner."""
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
    """A wish for more actors that is not old enough yet: the least of all since ``since_s``."""

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


class Wishes:
    """How many actors were wanted at most during the last seconds: a sliding maximum."""

    def __init__(self, window_s: float) -> None:
        """Nothing is known yet."""
        self._window_s = window_s
        self._since_s = self._last_s = -math.inf
        # Until when each held. Falling: what is smaller than a later one is never the most again.
        self._falling: deque[tuple[float, Wanted]] = deque()

    def add(self, wanted: Wanted, now_s: float) -> None:
        """Take what is wanted now; a window without any wish breaks off what was known."""
        if now_s - self._last_s > self._window_s:
            self.clear()
            self._since_s = now_s
        self._last_s = now_s
        if self._falling:  # the last one held until now
            self._falling.append((now_s, self._falling.pop()[1]))
        while self._falling and self._falling[-1][1].actors <= wanted.actors:
            self._falling.pop()
        self._falling.append((now_s, wanted))

    def most(self, now_s: float) -> Wanted | None:
        """Return the most that was wanted; ``None`` while less than a window is known."""
        while len(self._falling) > 1 and self._falling[0][0] <= now_s - self._window_s:
            self._falling.popleft()
        is_whole = self._falling and self._last_s - self._since_s >= self._window_s
        return self._falling[0][1] if is_whole else None

    def clear(self) -> None:
        """Forget everything."""
        self._falling.clear()
        self._since_s = self._last_s = -math.inf


class ScalingPolicy:
    """One pool's decisions, one after the other."""

    def __init__(self, targets: ScalingTargets, ahead_s: float = 0.0) -> None:
        """Nothing is waited for yet.

        That there may be fewer actors is decided ``ahead_s`` before the delay for it is over: as
        long as signals cover, since what was wanted at the end of that covers it, and as a change
        takes, so that who is not needed is gone after the delay.
        """
        self.targets = targets
        self._waiting: Waiting | None = None
        self._wishes = Wishes(max(0.0, targets.downscale_delay_s - ahead_s))
        self._last_shrink = (0, -math.inf)

    def decide(
        self,
        num_actors: int,
        signals: Signals | None,
        now_s: float,
        lately: Signals | None = None,
    ) -> Wanted | None:
        """Return the number of actors to go to, or ``None`` to stay.

        ``lately`` are signals over a shorter time, where there are such; more actors come by them.
        Where the number is out of bounds that is at once; without signals nothing else happens.
        More come when all that was wanted for a delay was more, and then the least of it. There
        are never fewer than what was wanted at any time of the delay for them, so a load that
        fades takes actors along one after the other, each that delay after it was needed last.
        What did not change the number is decided again after another delay.
        """
        bounded = self.targets.bounded(num_actors)
        if bounded != num_actors:
            self._waiting = None
            self._wishes.clear()
            return Wanted(bounded, f"{num_actors} actors are out of bounds")
        if signals is not None:
            self._wishes.add(wanted_actors(self.targets, num_actors, signals), now_s)
        lately = lately or signals
        if lately is None:
            self._waiting = None
            return None
        wanted = wanted_actors(self.targets, num_actors, lately)
        if wanted.actors > num_actors:
            more = self._more(wanted, now_s)
            if more is not None:
                self._wishes.add(more, now_s)  # or they might be too many at once
            return more
        self._waiting = None
        most = self._wishes.most(now_s)
        delay_s = self.targets.downscale_delay_s
        tried_with, at_s = self._last_shrink
        is_again = tried_with == num_actors and now_s - at_s < delay_s
        if most is None or most.actors >= num_actors or is_again:
            return None
        self._last_shrink = (num_actors, now_s)
        return _after(most, delay_s)

    def _more(self, wanted: Wanted, now_s: float) -> Wanted | None:
        before = self._waiting or Waiting(now_s, wanted)
        least = min(before.wanted, wanted, key=lambda one: one.actors)
        self._waiting = waiting = replace(before, wanted=least)
        delay_s = self.targets.upscale_delay_s
        if now_s - waiting.since_s < delay_s:
            return None
        self._waiting = None
        return _after(waiting.wanted, delay_s)


def _after(wanted: Wanted, delay_s: float) -> Wanted:
    return replace(wanted, reason=f"{wanted.reason}, for {delay_s:g} s")


class BusyMeter:
    """Busy time and queue time of actors over the last :data:`SIGNAL_S`, from their counters."""

    def __init__(self) -> None:
        """No report has come yet."""
        self._reports: dict[str, deque[tuple[float, ActorReport]]] = {}
        self._gone: list[tuple[str, deque[tuple[float, ActorReport]]]] = []

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's report; counters of an earlier generation are forgotten."""
        kept = self._reports.setdefault(report.actor_id, deque())
        if kept and kept[-1][1].generation != report.generation:
            kept.clear()
        kept.append((now_s, report))
        while len(kept) > 2 and kept[1][0] <= now_s - SIGNAL_S:
            kept.popleft()
        self._gone = [one for one in self._gone if one[1][-1][0] > now_s - SIGNAL_S]

    def forget(self, actor_id: str) -> None:
        """Drop an actor that is away."""
        self._reports.pop(actor_id, None)

    def leave(self, actor_id: str, pool: str) -> None:
        """Take an actor as gone from its pool for good: others have what it did until now."""
        kept = self._reports.pop(actor_id, None)
        if kept:
            self._gone.append((pool, kept))

    def restart(self) -> None:
        """Forget what came before now, since there are more actors, or experts are elsewhere."""
        self._reports.clear()
        self._gone.clear()

    def signals(
        self, actor_ids: Collection[str], over_s: float = SIGNAL_S, pool: str = ""
    ) -> Signals | None:
        """Return what these actors did over the last ``over_s``, at most :data:`SIGNAL_S`.

        With them counts what those did in that time that have left the ``pool``. ``None`` while
        one of them has not been heard of for so long: a moment says too little.
        """
        busy_devices = queue_s = now_s = 0.0
        for actor_id in actor_ids:
            kept = self._reports.get(actor_id)
            if not kept:
                return None
            last_s, last = kept[-1]
            early = [one for one in kept if one[0] <= last_s - over_s]
            if not early:
                return None
            first_s, first = early[-1]
            busy_devices += min((last.busy_s - first.busy_s) / (last_s - first_s), 1.0)
            now_s = max(now_s, last_s)
            if last.frames > first.frames:
                waited_s = (last.waited_s - first.waited_s) / (last.frames - first.frames)
                queue_s = max(queue_s, waited_s)
        for of_pool, kept in self._gone:
            if of_pool == pool:
                busy_devices += _busy_since(kept, now_s - over_s) / over_s
        return Signals(busy_devices, queue_s)


def _busy_since(kept: Sequence[tuple[float, ActorReport]], since_s: float) -> float:
    """Return for how long an actor has computed since then, evenly between two reports."""
    told_s = [at_s for at_s, _ in kept]
    busy_s = [report.busy_s for _, report in kept]
    return busy_s[-1] - float(np.interp(since_s, told_s, busy_s))
