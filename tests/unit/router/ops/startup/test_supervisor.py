"""A supervised command: its parent ends as it does, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import psutil
import pytest

from tests.cluster_fixture import is_alive

LIMIT_S = 60.0
COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path
from router.ops.startup.supervisor import supervised
handles_signals = supervised(lambda line: print(line, flush=True), Path(sys.argv[2]))
# As Ray's agents do: in a session of its own, and below a process that has ended.
words = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
subprocess.run([sys.executable, "-c", words], check=True)
if sys.argv[1] == "handles":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(8))
    handles_signals()
print("ready", os.getpid(), flush=True)
if sys.argv[1] != "ends":
    time.sleep(600)
"""


@contextmanager
def command(how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a supervised command; gives it, and the pid of the child. Its folder is gone then."""
    folder = mkdtemp()
    words = [sys.executable, "-c", COMMAND, how, folder]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline().split()[1])
            assert process.poll() == -signal.SIGKILL or not Path(folder).exists()
        finally:
            process.kill()
            rmtree(folder, ignore_errors=True)


def below(pid: int) -> list[int]:
    return [one.pid for one in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_child_handles_it_ends_all_at_once(
    number: signal.Signals, code: int
) -> None:
    with command("starts") as (process, child):
        pids = below(process.pid)
        assert child in pids
        assert len(pids) == 2
        process.send_signal(number)
        out, _ = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (code, f"expertmesh: {number.name}: ending\n")
        assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, 8)])
def test_a_signal_that_the_child_handles_is_passed_on(number: signal.Signals, code: int) -> None:
    with command("handles") as (process, _):
        pids = below(process.pid)
        process.send_signal(number)
        assert process.wait(LIMIT_S) == code
        assert not [pid for pid in pids if is_alive(pid)]


def test_the_end_of_the_child_is_the_commands() -> None:
    with command("ends") as (process, _):
        assert process.wait(LIMIT_S) == 0


def test_what_a_killed_child_leaves_is_ended() -> None:
    with command("handles") as (process, child):
        pids = below(process.pid)
        os.kill(child, signal.SIGKILL)
        assert process.wait(LIMIT_S) == 128 + signal.SIGKILL
        assert not [pid for pid in pids if is_alive(pid)]
