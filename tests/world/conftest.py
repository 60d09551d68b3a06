"""A world's product logs much, and its end leaves generators that nobody goes on with.

The seeds run beside the other worlds and the units, which have one core, and yield to them.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from tests.world.many import Found, read_found, write_found

SEEDS = range(200)
PROCESSES = 2
LIMIT_S = 800.0
Begun = tuple[SpawnProcess, Path]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of either."""
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: None)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)


@pytest.fixture(scope="session", autouse=True)
def begun(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Begun | None]:
    """Begin the seeds in a process of their own, if a test of this run asks what came of them.

    This process may have no thread that waits for them, since worlds replace the clock.
    """
    used = (getattr(item, "fixturenames", ()) for item in request.session.items)
    if not any("found_beside" in names for names in used):
        yield None
        return
    file = tmp_path_factory.mktemp("seeds") / "found.json"
    process = multiprocessing.get_context("spawn").Process(
        target=write_found, args=(file, SEEDS, PROCESSES, LIMIT_S)
    )
    process.start()
    yield process, file
    process.kill()  # its workers end with it
    process.join()


@pytest.fixture
def found_beside(begun: Begun) -> list[Found]:
    """What came of each of :data:`SEEDS`; the test that asks comes after the units."""
    process, file = begun
    process.join()
    assert process.exitcode == 0
    return read_found(file)
