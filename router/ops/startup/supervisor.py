"""Runs a command in a child process, whose parent ends all that the child leaves behind.

While Ray starts, it handles signals in C++: at SIGTERM it prints a stack and leaves processes. So
the parent has the signals. Until the child handles them itself, one ends the child and all below it
at once. From then on each is passed on (:mod:`router.ops.startup.termination`). Where the parent
itself is killed, the child is interrupted.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from router.ops.startup.leftovers import adopt_orphans, kill_descendants

_PR_SET_PDEATHSIG = 1  # prctl(2)


def supervised(say: Callable[[str], None], folder: Path) -> Callable[[], None]:
    """Go on in a child of this process, which ends as the child does; does not return here.

    In the child it returns what is to be called once the child handles signals itself. No other
    thread may run yet. ``say`` prints a line, and may be called in a signal handler. ``folder`` is
    removed at the end.
    """
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(writer)
        _Supervisor(child, reader, say, folder).wait()
    os.close(reader)
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches only the parent
    with suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGINT)
    return lambda: os.close(writer)


class _Supervisor:
    """The parent of a command."""

    def __init__(self, child: int, reader: int, say: Callable[[str], None], folder: Path) -> None:
        """The other end of ``reader`` is closed once the child handles signals, or has ended."""
        self._child, self._reader, self._say, self._folder = child, reader, say, folder

    def wait(self) -> None:
        """Exit as the child does, once nothing is left below this process."""
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background
                signal.signal(number, self._on_signal)
        _, status = os.waitpid(self._child, 0)
        code = os.waitstatus_to_exitcode(status)
        self._exit(code if code >= 0 else 128 - code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if select.select([self._reader], [], [], 0)[0]:
            with suppress(ProcessLookupError):
                os.kill(self._child, number)
            return
        self._say(f"expertmesh: {signal.Signals(number).name}: ending")
        self._exit(128 + number)

    def _exit(self, code: int) -> None:
        kill_descendants()
        shutil.rmtree(self._folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
