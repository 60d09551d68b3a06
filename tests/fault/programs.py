"""Runs programs of this folder whose Ray cannot live in one process with the tests'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def started(name: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program; at the end, ends what is left of it, and nothing else.

    ``variables`` are added to its environment, which has none of Ray's otherwise.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.fault.{name}", *arguments],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()


def told_by(process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    """Wait for a program's end; returns the object that it printed."""
    output, errors = process.communicate(timeout=limit_s)
    assert process.returncode == 0, errors[-4000:]
    # Ray may print lines of its own at any time.
    [line] = [line for line in output.splitlines() if line.startswith("{")]
    told: dict[str, Any] = json.loads(line)
    return told


def run(name: str, *arguments: str, limit_s: float, **variables: str) -> dict[str, Any]:
    """Run a program and return the object that it prints; see :func:`started`."""
    with started(name, *arguments, **variables) as process:
        return told_by(process, limit_s)
