"""The memory of this host that processes may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

# The files of a limit, of the use and of statistics; the statistic of file cache that the kernel
# can drop.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of this machine, or of this process's container where that has less."""

    total_bytes: int
    available_bytes: int


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return the memory that processes may take."""
    machine = psutil.virtual_memory()
    for names in _CGROUPS:
        limit = _cgroup_memory(cgroup, *names)
        if limit is not None:
            return Memory(
                min(machine.total, limit.total_bytes),
                min(machine.available, limit.available_bytes),
            )
    return Memory(machine.total, machine.available)


def _cgroup_memory(folder: Path, limit: str, use: str, stat: str, cached: str) -> Memory | None:
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / use).read_text())
        lines = (folder / stat).read_text().splitlines()
    except (OSError, ValueError):  # no such version of cgroups, or no limit ("max")
        return None
    statistics = dict(line.rpartition(" ")[::2] for line in lines)
    used_bytes -= int(statistics.get(cached, 0))
    return Memory(limit_bytes, max(0, limit_bytes - used_bytes))
