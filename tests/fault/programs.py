"""Runs programs of this folder whose Ray cannot live in one process with the tests'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.environment import without_ray


def run(name: str, *arguments: str, limit_s: float, **variables: str) -> dict[str, Any]:
    """Run a program and return the object that it prints; ends what is left, and nothing else.

    ``variables`` are added to its environment, which has none of Ray's otherwise.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.fault.{name}", *arguments],
        cwd=Path(__file__).parents[2],
        env=without_ray() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
            process.kill()
    assert process.returncode == 0, errors[-4000:]
    # Ray may print lines of its own at any time.
    [line] = [line for line in output.splitlines() if line.startswith("{")]
    told: dict[str, Any] = json.loads(line)
    return told
