"""Freed blocks go back to the system, also those that glibc would keep."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cluster.environment import router_environment

PROGRAM = """
from pathlib import Path
from cluster.heap import give_back_freed

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

blocks = [bytearray(b"x") * (1 << 20) for _ in range(40)]
last = bytearray(b"x") * 1000
held = resident_mb()
blocks.clear()
freed = resident_mb()
give_back_freed()
print(held - freed, freed - resident_mb())
"""
IS_GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize("threads", [1] if IS_GLIBC else [])
def test_what_a_routers_heap_would_keep_goes_back(threads: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **router_environment(threads)},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    by_itself, given_back = map(float, run.stdout.split())
    assert by_itself < 5
    assert given_back > 30
