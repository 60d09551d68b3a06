"""A pseudo-terminal, to run the command as a person does."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress


class Terminal:
    """The command at a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.leader, follower = pty.openpty()
        code = "from router.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(follower)
        weakref.finalize(self, self.process.kill)  # where a test fails, too
        self.shown = ""

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Read until ``text`` is shown, and forget all up to there."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self.shown:
            left_s = max(0.0, deadline_s - time.monotonic())
            ready, _, _ = select.select([self.leader], [], [], left_s)
            assert ready, f"{text!r} is not in {self.shown!r}"
            self.shown += os.read(self.leader, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def interrupt(self, then: str) -> None:
        """Press Ctrl-C, again where Python's readline has missed it, until ``then`` is shown."""
        for _ in range(20):
            self.process.send_signal(signal.SIGINT)
            with suppress(AssertionError):
                return self.wait_for(then, timeout_s=1)
        raise AssertionError(f"{then!r} is not in {self.shown!r}")

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def end(self) -> int:
        """Wait for the command's end; returns its exit code."""
        code = self.process.wait(60)
        os.close(self.leader)
        return code
