"""Says in a line why a start is slow, where that is measured.

The first start after an install or a reboot reads about a gigabyte (torch, Ray, transformers) from
disk. A start beside busy programs waits for the processors. Linux counts the time in which some
process waits for the one or the other (``/proc/pressure``). Where it does not, nothing is said.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from router.ops.startup.announce import Start

SLOW_S = 20.0
"""A start that has two cores to itself, and all files in memory, is ready before."""
LOOK_S, LOOKS = 2.5, 4
"""How often the usage is taken, and over how many of these times a cause is measured."""
POLL_S = 0.5
MIN_SHARE = 0.5
"""Of the measured time, which a cause must have slowed down at least."""
PRESSURE = Path("/proc/pressure")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command and this machine have used so far; all times in seconds.

    ``own_cpu_s`` and ``read_bytes`` (from storage) are those of the command and its descendants,
    ``cpu_s`` that of all processes. In ``disk_wait_s`` and ``cpu_wait_s``, some process of this
    machine waited for the disk, or for a processor.
    """

    at_s: float
    read_bytes: int
    own_cpu_s: float
    cpu_s: float
    disk_wait_s: float
    cpu_wait_s: float


def usage(command: psutil.Process) -> Usage:
    """Return the usage up to now; raises :class:`OSError` where Linux does not count the waits."""
    read_bytes, own_cpu_s = 0, 0.0
    for process in (command, *command.children(recursive=True)):
        try:
            read_bytes += process.io_counters().read_bytes
            own_cpu_s += sum(process.cpu_times()[:4])  # with the children that have ended
        except psutil.Error:  # it has ended
            continue
    times = psutil.cpu_times()
    return Usage(
        time.monotonic(),
        read_bytes,
        own_cpu_s,
        times.user + times.nice + times.system,
        _waited_s("io"),
        _waited_s("cpu"),
    )


def _waited_s(resource: str) -> float:
    """Return the time in which some process waited for a resource since this machine started."""
    some, _, _ = (PRESSURE / resource).read_text(encoding="ascii").partition("\n")
    return int(some.rpartition("total=")[2]) / 1e6


def cause(before: Usage, now: Usage, processors: int) -> tuple[str, str]:
    """Return what slowed a command down between two times, and the line that says so.

    Both are empty where it is not measured.
    """
    elapsed_s = now.at_s - before.at_s
    if now.disk_wait_s - before.disk_wait_s >= MIN_SHARE * elapsed_s:
        read = f"{now.read_bytes / 1e9:.1f} GB read so far"
        return "disk", f"waits for the disk, {read}; the next start should find them in memory"
    own_s, all_s = now.own_cpu_s - before.own_cpu_s, now.cpu_s - before.cpu_s
    busy = (all_s - own_s) / elapsed_s
    waits = now.cpu_wait_s - before.cpu_wait_s >= MIN_SHARE * elapsed_s
    if waits and busy >= MIN_SHARE * processors:
        return "cpu", f"other programs keep {busy:.1f} of {processors} processors busy"
    return "", ""


def command_began_at_s() -> float:
    """Return when this process was created, by the monotonic clock."""
    # The wall clock is read once: it may jump.
    return time.monotonic() - max(time.time() - psutil.Process().create_time(), 0.0)


def explain_slow_start(say: Callable[[str], None], starts: Sequence[Start]) -> None:
    """Print each cause once, while one of the ``starts`` is not ready, from :data:`SLOW_S` on.

    Returns at once. What it starts ends with the process.
    """
    threading.Thread(target=_explain, args=(say, starts), name="slow start", daemon=True).start()


def _explain(say: Callable[[str], None], starts: Sequence[Start]) -> None:
    command, processors = psutil.Process(), psutil.cpu_count() or 1
    looks: deque[Usage] = deque(maxlen=LOOKS + 1)
    told = {""}
    while waiting := [start for start in starts if not start.is_ready.is_set()]:
        if not looks or time.monotonic() - looks[-1].at_s >= LOOK_S:
            try:
                looks.append(usage(command))
            except OSError:  # Linux does not count the waits
                return
            elapsed_s = looks[-1].at_s - waiting[0].began_at_s
            if elapsed_s >= SLOW_S and len(looks) > LOOKS:
                resource, reason = cause(looks[0], looks[-1], processors)
                if resource not in told:
                    told.add(resource)
                    say(f"expertmesh: not ready after {elapsed_s:.0f} s: {reason}")
        time.sleep(POLL_S)
