"""Ends the processes of a command's own Ray that would outlive the command.

Ray ends its processes when the command ends. A command that is interrupted while Ray starts leaves
agents behind: their parent is gone, and Ray is not yet ready to end them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

import psutil
import ray

GRACE_S = 3.0
INTERRUPTED = 130
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def end_with_this_process() -> None:
    """End all descendants of this process before it ends; call it once Ray is imported.

    Exit handlers run in the opposite order of their registration, so this one runs before Ray's.
    """
    atexit.register(end_descendants, _interruption())


def _interruption() -> threading.Event:
    """Return an event that Ctrl-C sets; the former handler still runs."""
    came = threading.Event()
    usual = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        came.set()
        if callable(usual):
            usual(number, frame)

    if callable(usual):  # it may be ignored, as in a shell's background
        signal.signal(signal.SIGINT, note)
    return came


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, where the system can.

    Otherwise the system's first process becomes their parent, and they cannot be found from here.
    """
    with suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(interrupted: threading.Event) -> None:
    """End Ray, and kill the descendants that are still alive :data:`GRACE_S` later.

    Where Ctrl-C came while Ray started, this ends the process, too: Ray's half-made connection
    would crash the interpreter at its end.
    """
    # This takes seconds at most; another Ctrl-C would only print a stack.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    is_half_made = interrupted.is_set() and not ray.is_initialized()
    _adopt_orphans()
    descendants = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(descendants, timeout=GRACE_S)
    # Descendants may have started others while they were ended.
    left = [*left, *(p for p in psutil.Process().children(recursive=True) if p not in left)]
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=GRACE_S)
    if is_half_made:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
