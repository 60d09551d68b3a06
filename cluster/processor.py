"""This machine's processor: its name, for tables of measurements, and how much of it is usable."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux tells the processor's name."""


def _named_in(cpu_info: str) -> str:
    """Return the processor's name from what Linux tells of it; empty where it tells none."""
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def processor_name() -> str:
    """Return the processor's name, or its architecture where nothing tells the name."""
    name = _named_in(CPU_INFO.read_text(encoding="utf-8")) if CPU_INFO.exists() else ""
    return name or platform.machine()


def num_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
