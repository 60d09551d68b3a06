"""Ends the processes of a command's own Ray that would outlive the command.

Ray ends its processes when the command ends. A command that is interrupted while Ray starts leaves
agents behind: their parent is gone, and Ray is not yet ready to end them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress

import psutil
import ray

GRACE_S = 3.0
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def end_descendants() -> None:
    """End Ray, and kill the descendants that are still alive :data:`GRACE_S` later."""
    _adopt_orphans()
    descendants = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(descendants, timeout=GRACE_S)
    _kill(left)


def kill_descendants() -> None:
    """Kill all descendants of this process."""
    _adopt_orphans()
    _kill(psutil.Process().children(recursive=True))


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, where the system can.

    Otherwise the system's first process becomes their parent, and they cannot be found from here.
    """
    with suppress(AttributeError, OSError):  # Linux alone has it
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
