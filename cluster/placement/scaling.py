"""How many actors of a pool the load needs.

The targets are a share of busy time, and how long frames may wait. The pool grows when a target was
exceeded all through the upscale delay, and shrinks when fewer actors would have been enough all
through the downscale delay. The clock is the caller's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.spec import ActorReport, ScalingTargets

SIGNAL_S = 2.0
"""The time over which busy time and queue time are averaged."""
RECENT_S = 1.0
"""The same for growing: the upscale delay smooths enough, and a rise shows a second sooner."""
HYSTERESIS = 0.1
"""Fewer actors must be below the target by this part of it, or the pool would soon grow again."""
QUEUE_HYSTERESIS = 0.5
"""While frames wait longer than this part of their target, the pool does not shrink."""


@dataclass(frozen=True, slots=True)
class Signals:
    """The current load of a pool's actors.

    ``busy_devices`` is the sum of the busy shares of all devices, so the number of devices that
    would be enough if none ever rested. ``queue_s`` is how long a frame waits on average in the
    actor where frames wait longest.
    """

    busy_devices: float
    queue_s: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A wanted number of actors, and the reason in words."""

    actors: int
    reason: str


@dataclass(frozen=True, slots=True)
class Pending:
    """The wish for more actors while its delay runs: the least wanted since ``since_s``."""

    since_s: float
    wanted: Wanted


def wanted_actors(targets: ScalingTargets, num_actors: int, signals: Signals) -> Wanted:
    """Return how many actors the signals need, within the bounds of the targets."""
    busy = signals.busy_devices / num_actors
    reason = f"busy {busy:.0%} (target {targets.target_busy:.0%})"
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
        reason += f", would be {wanted} actors"
    return Wanted(bounded, f"{reason}, {queue}")


def wanted_standby(targets: ScalingTargets, num_actors: int) -> int:
    """Return how many standby actors are to be kept beside those in use."""
    if targets.dry_run:
        return 0
    return max(0, min(targets.standby_actors, targets.max_actors - num_actors))


def _ceil(number: float) -> int:
    return max(math.ceil(number - 1e-9), 0)


class WantedMax:
    """The largest number of actors wanted during the last ``window_s``: a sliding maximum."""

    def __init__(self, window_s: float) -> None:
        """Begin without a number."""
        self._window_s = window_s
        self._since_s = -math.inf
        self._wanted: deque[tuple[float, Wanted]] = deque()

    def add(self, wanted: Wanted, now_s: float) -> None:
        """Take the number wanted now; a pause of a whole window forgets the earlier ones."""
        if not self._wanted or now_s - self._wanted[-1][0] > self._window_s:
            self.clear()
            self._since_s = now_s
        self._wanted.append((now_s, wanted))

    def most(self, now_s: float) -> Wanted | None:
        """Return the largest number; ``None`` while less than a window has passed."""
        wanted = self._wanted
        while len(wanted) > 1 and wanted[1][0] <= now_s - self._window_s:
            wanted.popleft()  # each is wanted until the next one comes
        if not wanted or wanted[-1][0] - self._since_s < self._window_s:
            return None
        return max(reversed(wanted), key=lambda entry: entry[1].actors)[1]

    def clear(self) -> None:
        """Forget everything."""
        self._wanted.clear()


class ScalingPolicy:
    """Decides the number of actors of one pool."""

    def __init__(self, targets: ScalingTargets, ahead_s: float = 0.0) -> None:
        """Begin without any signals.

        Shrinking is decided ``ahead_s`` before the downscale delay is over, so that the actors are
        gone when it is. That is the time that signals cover, and the time of the change.
        """
        self.targets = targets
        self._pending: Pending | None = None
        self._max = WantedMax(max(0.0, targets.downscale_delay_s - ahead_s))
        self._last_shrink = (0, -math.inf)

    def decide(
        self,
        num_actors: int,
        signals: Signals | None,
        now_s: float,
        recent: Signals | None = None,
    ) -> Wanted | None:
        """Return the number of actors to go to, or ``None`` to stay.

        A number out of bounds is corrected at once; without ``signals`` nothing else happens. The
        pool grows by ``recent`` signals, over a shorter time, where there are any: when more were
        wanted all through the upscale delay, to the least of that. It shrinks to the most that was
        wanted during the downscale delay, so a fading load ends actors one by one, each that delay
        after it was needed last. A decision that did not change the number is repeated after
        another delay.
        """
        bounded = self.targets.bounded(num_actors)
        if bounded != num_actors:
            self._pending = None
            self._max.clear()
            return Wanted(bounded, f"{num_actors} actors are out of bounds")
        if signals is not None:
            self._max.add(wanted_actors(self.targets, num_actors, signals), now_s)
        recent = recent or signals
        if recent is None:
            self._pending = None
            return None
        wanted = wanted_actors(self.targets, num_actors, recent)
        if wanted.actors > num_actors:
            more = self._more(wanted, now_s)
            if more is not None:
                self._max.add(more, now_s)  # or they might be too many the next moment
            return more
        self._pending = None
        most = self._max.most(now_s)
        delay_s = self.targets.downscale_delay_s
        tried_with, at_s = self._last_shrink
        is_again = tried_with == num_actors and now_s - at_s < delay_s
        if most is None or most.actors >= num_actors or is_again:
            return None
        self._last_shrink = (num_actors, now_s)
        return _after(most, delay_s)

    def _more(self, wanted: Wanted, now_s: float) -> Wanted | None:
        before = self._pending or Pending(now_s, wanted)
        least = min(before.wanted, wanted, key=lambda wish: wish.actors)
        self._pending = pending = replace(before, wanted=least)
        delay_s = self.targets.upscale_delay_s
        if now_s - pending.since_s < delay_s:
            return None
        self._pending = None
        return _after(pending.wanted, delay_s)


def _after(wanted: Wanted, delay_s: float) -> Wanted:
    return replace(wanted, reason=f"{wanted.reason}, for {delay_s:g} s")


class BusyMeter:
    """Busy time and queue time of actors over the last :data:`SIGNAL_S`, from their counters."""

    def __init__(self) -> None:
        """Begin without any report."""
        self._reports: dict[str, deque[tuple[float, ActorReport]]] = {}
        self._gone: list[tuple[str, deque[tuple[float, ActorReport]]]] = []

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's report; those of an earlier generation are forgotten."""
        kept = self._reports.setdefault(report.actor_id, deque())
        if kept and kept[-1][1].generation != report.generation:
            kept.clear()
        kept.append((now_s, report))
        while len(kept) > 2 and kept[1][0] <= now_s - SIGNAL_S:
            kept.popleft()
        self._gone = [(p, kept) for p, kept in self._gone if kept[-1][0] > now_s - SIGNAL_S]

    def forget(self, actor_id: str) -> None:
        """Drop an actor that is dead."""
        self._reports.pop(actor_id, None)

    def leave(self, actor_id: str, pool: str) -> None:
        """Note that an actor has left its pool; others take over the load that it had."""
        kept = self._reports.pop(actor_id, None)
        if kept:
            self._gone.append((pool, kept))

    def restart(self) -> None:
        """Forget all reports, since experts have moved to other actors."""
        self._reports.clear()
        self._gone.clear()

    def signals(
        self, actor_ids: Collection[str], over_s: float = SIGNAL_S, pool: str = ""
    ) -> Signals | None:
        """Return the load of these actors over the last ``over_s``, at most :data:`SIGNAL_S`.

        It includes the load of actors that left the ``pool`` in that time. ``None`` while the
        reports of one of the actors cover less: a moment says too little.
        """
        busy_devices = queue_s = now_s = 0.0
        for actor_id in actor_ids:
            kept = self._reports.get(actor_id)
            if not kept:
                return None
            last_at_s, last = kept[-1]
            early = [(at_s, report) for at_s, report in kept if at_s <= last_at_s - over_s]
            if not early:
                return None
            first_at_s, first = early[-1]
            busy_devices += min((last.busy_s - first.busy_s) / (last_at_s - first_at_s), 1.0)
            now_s = max(now_s, last_at_s)
            if last.frames > first.frames:
                waited_s = (last.waited_s - first.waited_s) / (last.frames - first.frames)
                queue_s = max(queue_s, waited_s)
        for left_pool, kept in self._gone:
            if left_pool == pool:
                busy_devices += _busy_since(kept, now_s - over_s) / over_s
        return Signals(busy_devices, queue_s)


def _busy_since(kept: Sequence[tuple[float, ActorReport]], since_s: float) -> float:
    """Return for how long an actor has computed since then, interpolated between reports."""
    at_s = [at_s for at_s, _ in kept]
    busy_s = [report.busy_s for _, report in kept]
    return busy_s[-1] - float(np.interp(since_s, at_s, busy_s))
