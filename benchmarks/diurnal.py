"""The controller's rule for the number of actors against two days of load, without any cluster.

    python -m benchmarks.diurnal [--devices N] [--routers N] [--hours H] [--start S] [--seed N]
        [--plot FILE.svg] [--json FILE] [--compare OLD.json]

Routers of several time zones ask for more by day than by night, each wavering on its own, and twice
a crowd comes. Every device is a queue: what comes in waits as in Pollaczek and Khinchine's formula
while there is less than it can do, and else for what has piled up. Nodes die and come back; a
device that is asked for takes ``--start`` seconds. The number follows
:mod:`cluster.placement.scaling`'s policy, fed as the controller feeds it. Printed are device-hours,
and the share of the work that waited longer than the objective, beside those of the smallest fixed
number of devices that misses as little. All of it follows from the seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, finish, machine, output_options, progress, show
from benchmarks.drawing import document, line, polyline, text
from cluster.placement.scaling import ScalingPolicy, Signals
from cluster.spec import ScalingTargets

STEP_S = 10.0
SERVICE_S = 0.002
"""What one frame takes a device on average; all take the same."""
OBJECTIVE_S = 0.010
"""The longest that a frame may wait to count as served well."""
TARGET_BUSY, TARGET_QUEUE_S = 0.75, 0.010
UP_S, DOWN_S = 30.0, 600.0
DEVICES_A_NODE = 8
NODE_LIFE_H = 1000.0
"""How long a node lives on average."""
SPREAD = 0.06
"""The standard deviation of devices' loads over their mean, as rebalancing leaves them."""
NIGHT = 0.25
"""The load of a router's night, by that of its day."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """A sudden load: from when, for how long, and how much of all, by the mean."""

    from_h: float
    hours: float
    height: float


CROWDS = (Crowd(10.0, 0.5, 0.25), Crowd(37.0, 1.0, 0.3))


@dataclass(slots=True)
class Course:
    """What came of one way of providing, a value a step: devices, load, work that waited, waits."""

    devices: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    changes: int = 0
    decide_s: float = 0.0

    def device_hours(self) -> float:
        """Return the time of all devices together, those that start too."""
        return sum(self.devices) * STEP_S / 3600

    def misses(self, load: np.ndarray) -> float:
        """Return the share of the work that waited for too long."""
        return float(np.dot(self.missed, load) / load.sum())


def load_of(steps: int, devices: int, routers: int, seed: int) -> np.ndarray:
    """Return the load of each step, in devices that would be just enough for it.

    But for crowds it peaks at 45 % of ``devices``.
    """
    source = np.random.default_rng(seed)
    hours = np.arange(steps) * STEP_S / 3600
    weights = source.lognormal(0.0, 0.5, routers)
    zones_h = source.normal(0.0, 2.0, routers)
    waver = np.ones(routers)
    total = np.empty(steps)
    for step, hour in enumerate(hours):
        day = (1 - np.cos(2 * np.pi * (hour - zones_h) / 24)) / 2
        waver = 1 + 0.98 * (waver - 1) + source.normal(0.0, 0.05, routers)
        total[step] = np.dot(weights, (NIGHT + (1 - NIGHT) * day) * np.maximum(waver, 0.0))
    total *= 0.45 * devices / total.max()
    for crowd in CROWDS:
        is_there = (hours >= crowd.from_h) & (hours < crowd.from_h + crowd.hours)
        total[is_there] += crowd.height * total.mean()
    return total


class Devices:
    """Devices that do their share of the load, and what piles up on each."""

    def __init__(self, number: int, start_s: float, seed: int) -> None:
        """Begin with so many that are up."""
        self._source = np.random.default_rng(seed)
        self._start_steps = round(start_s / STEP_S)
        self.up = number
        self._starting: list[tuple[int, int]] = []
        self._backlog_s = np.zeros(number)
        self._share = self._shares(number)

    @property
    def total(self) -> int:
        """Devices that are up or start."""
        return self.up + sum(number for _, number in self._starting)

    def _shares(self, number: int) -> np.ndarray:
        shares = np.maximum(1 + SPREAD * self._source.standard_normal(number), 0.1)
        return shares / shares.mean()

    def bring_to(self, number: int, step: int) -> None:
        """Ask for devices, or let some go: those that start first."""
        missing = number - self.total
        if missing > 0:
            self._starting.append((step + self._start_steps, missing))
        while missing < 0 and self._starting:
            due, starting = self._starting.pop()
            kept = max(starting + missing, 0)
            missing += starting - kept
            if kept:
                self._starting.append((due, kept))
        if missing < 0:
            self._resize(self.up + missing)

    def step(self, step: int, load: float) -> tuple[np.ndarray, np.ndarray]:
        """Let a step pass; returns each device's busy share and how long a frame waits."""
        come = sum(number for due, number in self._starting if due <= step)
        self._starting = [one for one in self._starting if one[0] > step]
        lost = DEVICES_A_NODE * self._source.poisson(
            self.up / DEVICES_A_NODE * STEP_S / 3600 / NODE_LIFE_H
        )
        lost = min(int(lost), self.up - 1)
        if lost:
            self._starting.append((step + self._start_steps, lost))
        if come or lost:
            self._resize(self.up + come - lost)
        offered = load / self.up * self._share  # seconds of work in a second
        self._backlog_s = np.maximum(self._backlog_s + (offered - 1) * STEP_S, 0.0)
        busy = np.minimum(offered + self._backlog_s / STEP_S, 1.0)
        steady = np.minimum(offered, 0.99)
        wait_s = SERVICE_S * steady / (2 * (1 - steady)) + self._backlog_s
        return busy, wait_s

    def _resize(self, number: int) -> None:
        """Spread what has piled up over another number of devices."""
        piled_s = self._backlog_s.sum()
        self.up = number
        self._backlog_s = np.full(number, piled_s / number)
        self._share = self._shares(number)


Decide = Callable[[int, Signals, float], int | None]


def play(
    load: np.ndarray, first: int, start_s: float, seed: int, decide: Decide | None = None
) -> Course:
    """Play a load with devices that ``decide`` how many they are, or keep to the first number."""
    devices, course = Devices(first, start_s, seed), Course()
    for step, amount in enumerate(load):
        busy, wait_s = devices.step(step, float(amount))
        course.missed.append(float((wait_s > OBJECTIVE_S).mean()))
        course.wait_s.append(float(np.quantile(wait_s, 0.99)))
        course.devices.append(devices.total)
        if decide is None:
            continue
        began_s = time.perf_counter()
        wanted = decide(
            devices.total, Signals(float(busy.sum()), float(wait_s.max())), step * STEP_S
        )
        course.decide_s = max(course.decide_s, time.perf_counter() - began_s)
        if wanted is not None:
            devices.bring_to(wanted, step)
            course.changes += 1
    return course


def by_policy(most: int) -> Decide:
    """Return the controller's own policy."""
    targets = ScalingTargets(1, most, TARGET_BUSY, TARGET_QUEUE_S, UP_S, DOWN_S)
    policy = ScalingPolicy(targets)

    def decide(number: int, signals: Signals, now_s: float) -> int | None:
        wanted = policy.decide(number, signals, now_s)
        return None if wanted is None else wanted.actors

    return decide


def least_fixed(
    load: np.ndarray,
    most: int,
    start_s: float,
    seed: int,
    misses: float,
    begin: Callable[[str], None],
) -> tuple[int, Course]:
    """Return the smallest fixed number of devices that misses as little, and its course."""
    low, high = int(load.mean()), most
    best = play(load, high, start_s, seed)
    while high - low > most // 500 + 1:
        begin(f"{low} to {high} devices, fixed")
        middle = (low + high) // 2
        course = play(load, middle, start_s, seed)
        if course.misses(load) <= misses:
            high, best = middle, course
        else:
            low = middle
    return high, best


def run(options: argparse.Namespace, begin: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures, and the courses thinned out to a point for each ten minutes."""
    steps = round(options.hours * 3600 / STEP_S)
    begin("load")
    load = load_of(steps, options.devices, options.routers, options.seed)
    begin("elastic")
    first = int(load[0] / TARGET_BUSY) + 1
    elastic = play(load, first, options.start, options.seed, by_policy(options.devices))
    misses = elastic.misses(load)
    number, fixed = least_fixed(load, options.devices, options.start, options.seed, misses, begin)
    every = max(1, round(600 / STEP_S))
    return {
        "figures": {
            "device_hours": elastic.device_hours(),
            "fixed_device_hours": fixed.device_hours(),
            "saved": 1 - elastic.device_hours() / fixed.device_hours(),
            "fixed_devices": number,
            "misses": misses,
            "fixed_misses": fixed.misses(load),
            "changes": elastic.changes,
            "decide_ms": 1000 * elastic.decide_s,
        },
        "courses": {
            "load": load[::every].round(1).tolist(),
            "elastic": elastic.devices[::every],
            "fixed": fixed.devices[::every],
            "wait_ms": _worst(elastic.wait_s, every),
            "fixed_wait_ms": _worst(fixed.wait_s, every),
        },
    }


def _worst(values: list[float], every: int) -> list[float]:
    """Return the largest of each stretch, in milliseconds."""
    return [1000 * max(values[at : at + every]) for at in range(0, len(values), every)]


WIDTH, LEFT, CHART, TOP = 1000, 80, 240, 50
COLORS = {"load": "#999999", "elastic": "#2a7f3f", "fixed": "#b02a2a"}
WORDS = {
    "load": "load, in devices that never rest",
    "elastic": "devices that follow the load",
    "fixed": "as many all the time, for as few misses",
}


def picture(courses: Mapping[str, list[float]], hours: float) -> str:
    """Return an SVG: devices and load, and below the waits, over the hours."""
    most = max(*courses["fixed"], *courses["elastic"])
    parts = [text(LEFT, 24, "Devices", size=15)]
    for name, color in COLORS.items():
        parts.append(polyline(_points(courses[name], most, TOP), color))
        at = LEFT + 90 + 290 * list(COLORS).index(name)
        parts += [line(at, 20, at + 24, 20, color), text(at + 30, 24, WORDS[name])]
    below = TOP + CHART + 70
    parts.append(text(LEFT, below - 16, "Wait of a frame, 99th percentile of devices, ms", size=15))
    longest = 4000 * OBJECTIVE_S
    for name, key in (("fixed", "fixed_wait_ms"), ("elastic", "wait_ms")):
        waits = [min(wait, longest) for wait in courses[key]]
        parts.append(polyline(_points(waits, longest, below), COLORS[name]))
    goal = below + CHART * (1 - 1000 * OBJECTIVE_S / longest)
    parts.append(line(LEFT, goal, WIDTH - 20, goal, "#999999", "4 4"))
    for top, largest in ((TOP, most), (below, longest)):
        for part in (0.0, 0.5, 1.0):
            y = top + CHART * (1 - part)
            parts.append(text(LEFT - 8, y + 4, f"{largest * part:,.0f}", "end"))
    for hour in range(0, round(hours) + 1, 6):
        x = LEFT + (WIDTH - LEFT - 20) * hour / hours
        parts.append(text(x, below + CHART + 20, f"{hour} h", "middle"))
    return document(WIDTH, below + CHART + 40, parts)


def _points(values: list[float], largest: float, top: float) -> list[tuple[float, float]]:
    width = (WIDTH - LEFT - 20) / max(len(values) - 1, 1)
    return [(LEFT + i * width, top + CHART * (1 - v / largest)) for i, v in enumerate(values)]


def report(result: Mapping[str, Any]) -> None:
    """Print a table."""
    told = result["figures"]
    rows = [
        ("following the load", f"{told['device_hours']:,.0f}", f"{told['misses']:.3%}"),
        (
            f"{told['fixed_devices']} all the time",
            f"{told['fixed_device_hours']:,.0f}",
            f"{told['fixed_misses']:.3%}",
        ),
    ]
    title = f"{told['saved']:.1%} fewer device-hours, {told['changes']} changes"
    show(title, rows, ("devices", "device-hours", "waited too long"))


def comparable(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures that runs are compared by."""
    told = result["figures"]
    return {"device-hours": Figure(told["device_hours"], "lower")}


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=10_000, help="the most there may be")
    parser.add_argument("--routers", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--start", type=float, default=120.0, help="seconds until one is up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture here")
    output_options(parser)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "diurnal", "machine": machine()}
    with progress("diurnal", 12) as begin:
        result |= run(options, begin)
    report(result)
    if options.plot is not None:
        options.plot.write_text(picture(result["courses"], options.hours), encoding="utf-8")
    return finish(result, comparable(result), options)


if __name__ == "__main__":
    sys.exit(main())
