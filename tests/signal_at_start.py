"""``expertmesh serve`` that gets a signal while it starts Ray: it ends, and leaves nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.shipped import free_ports
from tests.cluster_fixture import is_alive, wait_until
from tests.serve_run import READY_S, copy_with_ports, expertmesh_serve

ENDED_S, GONE_S = 30.0, 10.0
"""Ray's own end takes six seconds when it has not begun quite yet, with the cores to itself."""
STACKS = {"Traceback", "***"}
"""Words of a stack of Python's, and of one of C++."""
RAYLET = "raylet"
"""A process that Ray starts late."""
STARTED = "Started a local Ray instance"
"""Ray says so before the command has connected to it."""


def of_ray_in(folder: Path) -> dict[int, str]:
    """Return the processes that run with this folder as Ray's; zombies do not run.

    Those that give themselves a title write it over their environment; they have files open there.
    """
    found = {}
    for process in psutil.process_iter(["name", "environ", "open_files"]):
        environment, files = process.info["environ"] or {}, process.info["open_files"] or []
        is_in_it = any(Path(file.path).is_relative_to(folder) for file in files)
        is_of_it = is_in_it or environment.get("RAY_TMPDIR") == str(folder)
        if is_of_it and is_alive(process.pid):
            found[process.pid] = process.info["name"]
    return found


def check_signal_at_start(folder: Path, number: signal.Signals, moment: str) -> None:
    """Send a signal when the raylet runs, or when Ray has started; no process is left.

    ``moment`` is :data:`RAYLET` or :data:`STARTED`. Nobody prints a stack.
    """
    file, log = copy_with_ports(folder, *free_ports(2)), folder / "log"
    # The name is short enough for the sockets in it.
    with TemporaryDirectory(prefix="em") as of_ray:
        returncode = _ended_by(file, log, Path(of_ray), number, moment)
    assert returncode == 128 + number
    assert not STACKS & set(log.read_text().split())


def _ended_by(file: Path, log: Path, of_ray: Path, number: signal.Signals, moment: str) -> int:
    seen: set[int] = set()

    def running() -> dict[int, str]:
        found = of_ray_in(of_ray)
        seen.update(found)
        return found

    with expertmesh_serve(file, log, RAY_TMPDIR=str(of_ray)) as process:
        wait_until(
            lambda: STARTED in log.read_text() or moment in running().values(),
            "Ray starts",
            READY_S,
        )
        assert (moment == STARTED) == (STARTED in log.read_text())
        process.send_signal(number)
        process.wait(ENDED_S)
        wait_until(
            lambda: not running() and not any(map(is_alive, seen)), "no process is left", GONE_S
        )
    returncode: int = process.returncode
    return returncode
