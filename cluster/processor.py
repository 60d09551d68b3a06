"""This machine's processor: its name, for tables of measurements, and how much of it is usable."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
"""The file with the processor's name on Linux."""
# The files of a container's share of the processors' time: microseconds in each period of so many.
_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def _named_in(cpu_info: str) -> str:
    """Return the processor's name as Linux reports it; empty if it reports none."""
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def processor_name() -> str:
    """Return the processor's name, or its architecture where nothing tells the name."""
    name = _named_in(CPU_INFO.read_text(encoding="utf-8")) if CPU_INFO.exists() else ""
    return name or platform.machine()


def num_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processors this process may use: no more than its container's limit.

    A limit of one and a half processors counts as two.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    return min(usable, _cgroup_cpus(cgroup) or usable)


def _cgroup_cpus(folder: Path) -> int | None:
    """Return the processors whose whole time a container may use, rounded up; at least one."""
    for limit in _LIMITS:
        try:
            parts = " ".join((folder / name).read_text() for name in limit).split()
            quota, period = map(int, parts)
            if quota > 0 and period > 0:  # a quota of -1 is no limit
                return math.ceil(quota / period)
        except (OSError, ValueError):  # no such version of cgroups, or no limit ("max")
            continue
    return None
