"""Ends, with a command that starts a Ray of its own, whatever of that Ray would outlive it.

Ray ends its processes when the command ends. But one that is interrupted while Ray starts leaves
agents behind whose parent is gone, and Ray is then not yet ready to end them.
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
    """Have all processes that descend from this one ended before it is; call it once Ray is
    imported, since what is registered last runs first."""
    atexit.register(end_descendants, _interruption())


def _interruption() -> threading.Event:
    """Return what is set once Ctrl-C has come; whoever minds it still does."""
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
    """Have descendants whose parent ends become this process's children, where the system can.

    They would become those of the system's first process, and nobody here could tell whose they
    were.
    """
    with suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(interrupted: threading.Event) -> None:
    """End Ray, and whatever of this process's descendants is still there :data:`GRACE_S` later.

    Where Ctrl-C came while Ray started, this ends the process, too: Ray's half-made connection
    would have the interpreter crash at its own end.
    """
    # It takes seconds at most; another Ctrl-C would only print a stack.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    is_half_made = interrupted.is_set() and not ray.is_initialized()
    _adopt_orphans()
    descendants = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(descendants, timeout=GRACE_S)
    # And what one of them started while it was ended.
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
