"""Runs a peer's adapter with that peer's Python, and checks the reply."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.peers.side import Task

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900.0
LOG_CHARS = 4000
LOCAL_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Would lead a peer's Python to the packages of another environment."""


class PeerFailedError(Exception):
    """A peer gave no reply or a wrong one; the message has the end of its log."""


def ask(python: str, module: str, task: Task, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Return the reply of an adapter to a task.

    Raises :class:`PeerFailedError` where the process fails, takes longer than ``timeout_s``, or
    replies with another number of tokens than asked for. At the return the process has ended and
    its children are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_text(task.to_json(), encoding="utf-8")
        log_file, reply_file = folder / "log", folder / "reply"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [python, "-m", module, str(folder / "task"), str(reply_file)],
                cwd=ROOT,
                env=_environment(task.threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group, which ends as one
            )
            try:
                status = process.wait(timeout_s)
                problem = f"ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                problem = f"took longer than {timeout_s:.0f} s"
            finally:
                _end(process)
        if not problem and not reply_file.exists():
            problem = "ended without a reply"
        if problem:
            log_end = log_file.read_text(encoding="utf-8", errors="replace")[-LOG_CHARS:]
            raise PeerFailedError(f"{module} {task.format} {problem}; its log ends:\n{log_end}")
        reply: dict[str, Any] = json.loads(reply_file.read_text(encoding="utf-8"))
    check(reply, task)
    return reply


def check(reply: Mapping[str, Any], task: Task) -> None:
    """Raise :class:`PeerFailedError` where a reply has not all tokens of a task."""
    for count in task.streams:
        lengths = [len(tokens) for tokens in reply["streams"][str(count)]["tokens"]]
        if lengths != [task.tokens] * count:
            raise PeerFailedError(
                f"{task.format}: {count} streams of {task.tokens} tokens gave {lengths} tokens"
            )


def _environment(threads: int) -> dict[str, str]:
    """Return a peer's environment; the system's, without the paths of this interpreter."""
    inherited = {key: value for key, value in os.environ.items() if key not in LOCAL_VARIABLES}
    return {**inherited, "OMP_NUM_THREADS": str(threads)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a peer and its children, which are its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
