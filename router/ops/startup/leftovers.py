"""Ends the processes of a command's own Ray that would outlive the command."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress

import psutil

GRACE_S = 3.0
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def end_descendants() -> None:
    """End Ray, and kill the descendants that are still alive :data:`GRACE_S` later."""
    import ray  # kill_descendants is for a process that does without it

    adopt_orphans()
    descendants = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(descendants, timeout=GRACE_S)
    _kill(left)


def kill_descendants() -> None:
    """Kill all descendants of this process."""
    adopt_orphans()
    _kill(psutil.Process().children(recursive=True))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, where the system can.

    Otherwise the system's first process becomes their parent, and they cannot be found from here.
    """
    with suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, and the descendants that were started meanwhile."""
    processes = list(processes)
    processes += [p for p in psutil.Process().children(recursive=True) if p not in processes]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=GRACE_S)
