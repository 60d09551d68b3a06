"""The resources of this machine that serving needs: memory, disk, shared memory, processors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
# The files of a limit, of the use and of statistics; the statistic of file cache that the kernel
# can drop.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
)  # fmt: skip
_TRIAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of this machine, or of this process's container where that has less."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder for files; ``reason`` says why it takes none, and is empty where it does."""

    folder: Path
    total_bytes: int
    free_bytes: int
    reason: str = ""


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


def writable_folder(folder: Path) -> Disk:
    """Try a file of a megabyte in a folder, or in its nearest parent that exists."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage, reason = disk_usage(existing), ""
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * _TRIAL_BYTES)
            file.flush()
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "is full" if is_full else f"cannot be written to ({error.strerror})"
    return Disk(folder, usage.total, usage.free, reason)


def shared_memory_bytes() -> int | None:
    """Return the free shared memory for Ray's objects; ``None`` where the system has none."""
    return disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def num_cpus() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_python(program: str, *arguments: str, timeout_s: float) -> Any:
    """Run a Python program in a process of its own; return the JSON in its last line of output.

    Raises :class:`subprocess.TimeoutExpired`, and :class:`ValueError` with the last line of stderr
    when the output does not end in JSON.
    """
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(lines[-1]) from None
