"""Ends, with a command that starts a Ray of its own, whatever of that Ray would outlive it.

Ray ends its processes when the command ends. But one that is interrupted while Ray starts leaves
agents behind whose parent is gone, and Ray is then not yet ready to end them.
"""

from __future__ import annotations

import atexit
import signal

import psutil
import ray

GRACE_S = 3.0


def end_with_this_process() -> None:
    """Have all processes that descend from this one ended before it is; call it once Ray is
    imported, since what is registered last runs first."""
    atexit.register(end_descendants)


def end_descendants() -> None:
    """End Ray, and whatever of this process's descendants is still there :data:`GRACE_S` later."""
    # It takes seconds at most; another Ctrl-C would only print a stack.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descendants = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(descendants, timeout=GRACE_S)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=GRACE_S)
