"""The current load of experts and devices, from the counters that actors report.

Counters only grow while an actor lives, so a lost report costs nothing: the next one includes it.
Counts fade with ``WINDOW_S``, so a rate covers about the last half minute. Two exceptions make it
follow sooner: an expert whose load has surely risen has the rate of the last ``RISE_S``, and of an
expert whose load has surely fallen for the time of a fall, earlier counts are forgotten. The clock
is the caller's.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.spec import ActorReport, ExpertKey

WINDOW_S = 30.0
"""The time in which a count fades to 1/e of its weight."""
RISE_S = 2.0
"""The same for the rates in which a rise shows."""
FALL_S = 120.0
"""The default time after which nothing is left of a load that ended."""
MIN_FALL_S = 10.0
"""The shortest time of a fall: a tenth of it is still as long as reports are apart."""
FALL_PARTS = 10
"""The time of a fall is divided into this many parts. After each one a fall is looked for, over all
but the first two."""
SURE = 3.0
"""How many standard deviations of independent arrivals make a rise or a fall sure."""


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """The current load of one device.

    ``busy`` is the share of time in which it computes. ``wait_s`` is how long a frame waits on
    average; 0 where none came.
    """

    tokens_per_s: float
    busy: float
    wait_s: float


class _Fading:
    """A sum whose terms fade."""

    __slots__ = ("_at_s", "_sum", "_window_s")

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._sum = 0.0
        self._at_s = -math.inf
        self._window_s = window_s

    def add(self, amount: float, took_s: float, now_s: float) -> None:
        """Add an amount that came evenly over the last ``took_s`` seconds and has faded partly."""
        kept = (1 - math.exp(-took_s / self._window_s)) * self._window_s / took_s
        self._sum = self.at(now_s) + amount * kept
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """Return the faded sum."""
        return self._sum * math.exp(-(now_s - self._at_s) / self._window_s)

    def set(self, amount: float, now_s: float) -> None:
        """Set the sum."""
        self._sum, self._at_s = amount, now_s


class _Device:
    """One generation of an actor: its last report, and its sums."""

    __slots__ = (
        "at_s",
        "begun_at_s",
        "busy_s",
        "frames",
        "generation",
        "last",
        "tokens",
        "waited_s",
    )

    def __init__(self, report: ActorReport, now_s: float) -> None:
        self.generation = report.generation
        self.begun_at_s = self.at_s = now_s
        self.last = report
        self.tokens, self.frames = _Fading(), _Fading()
        self.busy_s, self.waited_s = _Fading(), _Fading()


class LoadTracker:
    """Rates of every expert over all its copies, and of every device."""

    def __init__(self, now_s: float, fall_s: float = FALL_S) -> None:
        """Begin without any load; until a window has passed, rates are those since now.

        ``fall_s`` after an expert's last load its rate is 0. Where the load is so low that a pause
        may be chance, the rate only fades.
        """
        self._begun_at_s = now_s
        self.fall_s = max(fall_s, MIN_FALL_S)
        self._counted: Counter[ExpertKey] = Counter()
        self._earlier: deque[tuple[float, Counter[ExpertKey]]] = deque([(now_s, Counter())])
        """The counts at times that are a part of ``fall_s`` apart."""
        self._fell_at_s: dict[ExpertKey, float] = {}
        """When the load of each expert was last found to have surely fallen."""
        self._experts: defaultdict[ExpertKey, _Fading] = defaultdict(_Fading)
        self._recent: defaultdict[ExpertKey, _Fading] = defaultdict(lambda: _Fading(RISE_S))
        self._devices: dict[str, _Device] = {}

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's report; the first of a generation only sets the counters' beginning."""
        device = self._devices.get(report.actor_id)
        if device is None or device.generation != report.generation:
            self._devices[report.actor_id] = _Device(report, now_s)
            return
        took_s = now_s - device.at_s
        if took_s <= 0:
            return
        computed = 0
        for key, count in report.tokens.items():
            added = count - device.last.tokens.get(key, 0)
            if added:
                self._experts[key].add(added, took_s, now_s)
                self._recent[key].add(added, took_s, now_s)
                self._counted[key] += added
                computed += added
        last = device.last
        device.tokens.add(computed, took_s, now_s)
        device.frames.add(report.frames - last.frames, took_s, now_s)
        device.busy_s.add(report.busy_s - last.busy_s, took_s, now_s)
        device.waited_s.add(report.waited_s - last.waited_s, took_s, now_s)
        device.last, device.at_s = report, now_s
        if now_s - self._earlier[-1][0] >= self.fall_s / FALL_PARTS:
            self._reset_fallen(now_s)
            self._earlier.append((now_s, self._counted.copy()))

    def _reset_fallen(self, now_s: float) -> None:
        """Give experts whose load has surely fallen the rate since it fell."""
        least_s = self.fall_s * (FALL_PARTS - 2) / FALL_PARTS
        while len(self._earlier) > 1 and self._earlier[1][0] <= now_s - least_s:
            self._earlier.popleft()
        since_s, before = self._earlier[0]
        over_s = now_s - since_s
        if over_s < least_s:
            return
        seconds = _faded_s(now_s - self._begun_at_s)
        for key, total in self._experts.items():
            count = self._counted[key] - before[key]
            expected = total.at(now_s) / seconds * over_s
            if count < expected - SURE * math.sqrt(expected):
                self._fell_at_s[key] = now_s
            # The rest of a fall may be too little to be sure of.
            if count < expected and now_s - self._fell_at_s.get(key, -math.inf) < self.fall_s:
                total.set(count / over_s * seconds, now_s)

    def forget(self, actor_id: str) -> None:
        """Drop a device that is gone; the load of its experts stays until it fades."""
        self._devices.pop(actor_id, None)

    def tokens_per_s(self, now_s: float) -> dict[ExpertKey, float]:
        """Return the rate of every expert that ever had load."""
        seconds = _faded_s(now_s - self._begun_at_s)
        recent_s = _faded_s(now_s - self._begun_at_s, RISE_S)

        def rate(key: ExpertKey, total: _Fading) -> float:
            recent = self._recent[key].at(now_s)
            surely = max(recent - SURE * math.sqrt(recent), 0.0)
            return max(total.at(now_s) / seconds, surely / recent_s)

        return {key: rate(key, total) for key, total in self._experts.items()}

    def devices(self, now_s: float) -> dict[str, DeviceLoad]:
        """Return the load of each device that has reported at least twice."""
        return {
            actor_id: _load_of(device, now_s)
            for actor_id, device in self._devices.items()
            if device.at_s > device.begun_at_s
        }

    def speeds(self, kind_of: Mapping[str, str], now_s: float) -> dict[str, float]:
        """Return the tokens that each device computes in a busy second.

        ``kind_of`` names the kind of each device. Devices of a kind are alike and have one speed,
        by their busy time together. A kind that was busy for less than a second is left out.
        """
        tokens: defaultdict[str, float] = defaultdict(float)
        busy_s: defaultdict[str, float] = defaultdict(float)
        for actor_id, device in self._devices.items():
            if actor_id in kind_of:
                tokens[kind_of[actor_id]] += device.tokens.at(now_s)
                busy_s[kind_of[actor_id]] += device.busy_s.at(now_s)
        return {
            actor_id: tokens[kind] / busy_s[kind]
            for actor_id, kind in kind_of.items()
            if busy_s[kind] >= 1.0 and tokens[kind] > 0
        }


def _load_of(device: _Device, now_s: float) -> DeviceLoad:
    seconds = _faded_s(now_s - device.begun_at_s)
    frames = device.frames.at(now_s)
    return DeviceLoad(
        tokens_per_s=device.tokens.at(now_s) / seconds,
        busy=device.busy_s.at(now_s) / seconds,
        wait_s=device.waited_s.at(now_s) / frames if frames > 0 else 0.0,
    )


def _faded_s(elapsed_s: float, window_s: float = WINDOW_S) -> float:
    """Return how much time the faded counts of the last ``elapsed_s`` seconds stand for."""
    return window_s * (1 - math.exp(-max(elapsed_s, 1e-9) / window_s))
