"""The resources of this machine that serving needs: disk, shared memory, processors."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

SHARED_MEMORY = Path("/dev/shm")
_TRIAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder for files; ``reason`` says why it takes none, and is empty where it does."""

    folder: Path
    total_bytes: int
    free_bytes: int
    reason: str = ""


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


class OutputError(ValueError):
    """A program's output does not end in JSON; the text is the last line of its ``stderr``."""

    def __init__(self, stderr: str) -> None:
        super().__init__((stderr.strip().splitlines() or ["it said nothing"])[-1])
        self.stderr = stderr


def run_python(
    program: str,
    *arguments: str,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
) -> Any:
    """Run a Python program in a process of its own; return the JSON in its last line of output.

    Its environment is ``variables``, or that of this process.

    Raises :class:`subprocess.TimeoutExpired`, and :class:`OutputError` when the output does not end
    in JSON.
    """
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=variables)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise OutputError(done.stderr) from None
