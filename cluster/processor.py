"""The name of this machine's processor, for tables of measurements."""

from __future__ import annotations

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
