"""What this machine has of what serving needs: memory, disk, shared memory, processors."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

import psutil

SHARED_MEMORY = Path("/dev/shm")
_CGROUPS = (  # limit, use, statistics and what they call file cache that can be dropped
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
)  # fmt: skip
_TRIAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this machine, or of the container that this process is in, if that has less."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder that is written to; ``reason`` says why it cannot be, if so."""

    folder: Path
    total_bytes: int
    free_bytes: int
    reason: str = ""


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return the memory that processes may take."""
    machine = psutil.virtual_memory()
    found = Memory(machine.total, machine.available)
    for names in _CGROUPS:
        limit = _cgroup_memory(cgroup, *names)
        if limit is not None:
            return Memory(
                min(found.total_bytes, limit.total_bytes),
                min(found.available_bytes, limit.available_bytes),
            )
    return found


def _cgroup_memory(folder: Path, limit: str, use: str, stat: str, cached: str) -> Memory | None:
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / use).read_text())
        lines = (folder / stat).read_text().splitlines()
    except (OSError, ValueError):  # no such version of cgroups, or no limit ("max")
        return None
    numbers = dict(line.rpartition(" ")[::2] for line in lines)
    used_bytes -= int(numbers.get(cached, 0))
    return Memory(limit_bytes, max(0, limit_bytes - used_bytes))


def writable_folder(folder: Path) -> Disk:
    """Look whether a folder, or the nearest one above that exists, takes a file of a megabyte."""
    place = next(one for one in (folder, *folder.parents) if one.exists())
    usage = disk_usage(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * _TRIAL_BYTES)
            file.flush()
    except OSError as error:
        reason = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else _words(error)
        return Disk(folder, usage.total, usage.free, reason)
    return Disk(folder, usage.total, usage.free)


def _words(error: OSError) -> str:
    return f"cannot be written to ({error.strerror})"


def shared_memory_bytes() -> int | None:
    """Return the free shared memory in which Ray puts its objects; ``None`` where there is none."""
    return disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def num_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
