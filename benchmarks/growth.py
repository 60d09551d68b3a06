"""Whether processes grow: their memory and descriptors over a run, and the trend of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show
from benchmarks.processor_time import ray_name

SAMPLE_S = 5.0
SETTLE_SHARE = 0.25
"""The part of a process's life that is not judged: caches fill, and code is compiled, at first."""
MIN_SAMPLES = 8
GROWTH_SHARE, GROWTH_MB, GROWTH_FDS = 0.05, 16.0, 16.0
"""A process is flat when its trend rises over the judged time by less than the larger of 5 % and
16 MB, and by less than 16 descriptors."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A process's resident memory and open descriptors at one moment."""

    at_s: float
    rss_mb: float
    descriptors: int


@dataclass(frozen=True, slots=True)
class Growth:
    """A long-lived process at the start and end of the run, and its trend over the judged time."""

    name: str
    pid: int
    first: Sample
    last: Sample
    mb_per_min: float
    descriptors_per_min: float
    is_flat: bool
    """Both memory and descriptors."""


def per_min(samples: Sequence[Sample], values: Sequence[float]) -> float:
    """Return how fast the samples' values rise, by Theil and Sen: a burst does not move it."""
    from scipy.stats import theilslopes

    return 60 * float(theilslopes(values, [one.at_s for one in samples]).slope)


def growth(name: str, pid: int, samples: Sequence[Sample]) -> Growth:
    """Judge one process by its samples, at least two after the first :data:`SETTLE_SHARE`."""
    judged = samples[int(len(samples) * SETTLE_SHARE) :]
    minutes = (judged[-1].at_s - judged[0].at_s) / 60
    mb_per_min = per_min(judged, [one.rss_mb for one in judged])
    descriptors_per_min = per_min(judged, [one.descriptors for one in judged])
    is_memory_flat = mb_per_min * minutes < max(GROWTH_SHARE * judged[0].rss_mb, GROWTH_MB)
    return Growth(
        name,
        pid,
        samples[0],
        samples[-1],
        mb_per_min,
        descriptors_per_min,
        is_flat=is_memory_flat and descriptors_per_min * minutes < GROWTH_FDS,
    )


NOT_JUDGED = frozenset({"log_monitor.py", "DashboardAgent"})
"""Two of Ray's own, which grow with every process that there ever was, whatever Ray program it is.

The first keeps each one's log open; the second takes 0.05 MB for each: 15 MB more after 240 plain
actors that did nothing.
"""


class Sampler:
    """Looks at every process below this one, again and again, on a thread of its own."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, str], list[Sample]] = {}
        self._started_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> list[Growth]:
        """Stop, and judge the processes that lived to the end and for long enough to be judged."""
        self._ended.set()
        self._thread.join()
        self._look()
        last_s = max(samples[-1].at_s for samples in self._samples.values())
        return [
            growth(name, pid, samples)
            for (pid, name), samples in self._samples.items()
            if samples[-1].at_s == last_s and len(samples) >= MIN_SAMPLES
        ]

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        import psutil

        at_s = time.monotonic() - self._started_s
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                name = "clients" if process == own else name_of(process.cmdline())
                if name in NOT_JUDGED:
                    continue
                sample = Sample(at_s, process.memory_info().rss / 1e6, process.num_fds())
            except psutil.Error:  # it ended a moment ago
                continue
            self._samples.setdefault((process.pid, name), []).append(sample)


def name_of(words: Sequence[str]) -> str:
    """Return what a process is called in the tables, from its command line."""
    if not words:
        return "?"
    scripts = [word for word in words if word.endswith(".py")]
    return ray_name(words[0]) or Path(scripts[0] if scripts else words[0]).name


def show_growth(processes: Sequence[Mapping[str, Any]]) -> None:
    """Print processes, each a :class:`Growth` as a dictionary."""
    rows = [
        (
            f"{one['name']} {one['pid']}",
            one["last"]["at_s"] - one["first"]["at_s"],
            *(one[end]["rss_mb"] for end in ("first", "last")),
            one["mb_per_min"],
            *(one[end]["descriptors"] for end in ("first", "last")),
            one["descriptors_per_min"],
            "flat" if one["is_flat"] else "[red]grows[/red]",
        )
        for one in processes
    ]
    columns = ["process", "seconds|.0f", "MB at first|.0f", "at last|.0f", "MB/min|.2f"]
    columns += ["descriptors at first", "at last", "/min|.2f", ""]
    show("long-lived processes", rows, columns)
