"""The parts of the command, each in a process of its own with a limit of time.

A part that fails or takes too long is reported, and the next one goes on. A process is asked to end
(SIGTERM), then killed, with the processes that it has started and no others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from router.ops.doctor.machine import SHARED_MEMORY

END_S = 10.0
"""How long a process that was asked to end may take."""
LOG_LINES = 12
LINE_CHARS = 120

Status = Literal["ok", "failed", "over its limit", "no time left"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A part: its name, which is its argument too, and its limit with its end."""

    name: str
    limit_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a part; ``result`` is ``None`` where it has none, for the ``reason``."""

    name: str
    status: Status
    took_s: float
    reason: str = ""
    result: Any = None


def run_all(
    parts: Sequence[Part], folder: Path, label: str, deadline_s: float, say: Say, module: str
) -> list[Outcome]:
    """Run the parts one after another until ``deadline_s`` (monotonic).

    Their temporary folders, whose names begin with ``label``, are removed after each.
    """
    outcomes = []
    for part in parts:
        left_s = deadline_s - time.monotonic()
        if left_s < 2 * END_S:
            outcomes.append(Outcome(part.name, "no time left", 0.0, "other parts took it"))
        else:
            say(f"{part.name}: at most {min(part.limit_s, left_s):.0f} s")
            limited = Part(part.name, min(part.limit_s, left_s))
            try:
                outcomes.append(run_part(limited, folder, say, module))
            finally:
                remove_folders(label)
        outcome = outcomes[-1]
        say(f"{part.name}: {outcome.status}, {outcome.took_s:.0f} s")
        if outcome.reason:
            say(outcome.reason)
    return outcomes


def run_part(part: Part, folder: Path, say: Say, module: str) -> Outcome:
    """Run ``python -m MODULE FOLDER NAME``; the process writes ``NAME.json`` into the folder."""
    result, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    result.unlink(missing_ok=True)
    started_s = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), part.name],
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the part
        )
        assert process.stdout is not None
        lines = threading.Thread(
            target=_pass_on, args=(process.stdout, part.name, say), daemon=True
        )
        lines.start()
        try:
            process.wait(max(0.0, part.limit_s - END_S))
            status: Status = "failed" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            status = "over its limit"
        finally:
            end(process)
    lines.join(1.0)
    took_s = time.monotonic() - started_s
    if status == "ok" and not result.exists():
        status = "failed"
    if status == "ok":
        return Outcome(part.name, status, took_s, "", json.loads(result.read_text("utf-8")))
    return Outcome(part.name, status, took_s, _last_lines(log))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended, and those that it has started."""
    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_S / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_S / 4)
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=END_S / 4)


def remove_folders(label: str) -> None:
    """Remove the temporary folders that a killed part has left: their names begin so."""
    for base in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for folder in base.glob(f"{label}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _pass_on(lines: IO[bytes], name: str, say: Say) -> None:
    for line in lines:
        text = line.decode(errors="replace").strip()
        if text and "(raylet)" not in text:  # Ray's own processes, which its logs have too
            say(f"{name}: {text[:LINE_CHARS]}")


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{log} ends:", *lines[-LOG_LINES:]])
