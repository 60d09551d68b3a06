"""A worker node is lost without grace: its experts come back on another, and nothing fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

LIMIT_S = 280.0


def run() -> dict[str, Any]:
    """Run the program and return what it tells; ends what is left of it, and nothing else."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fault.node_loss"],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()
    assert process.returncode == 0, errors[-4000:]
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


@pytest.mark.timeout(300)
def test_a_lost_worker_node_costs_time_and_no_request() -> None:
    told = run()
    before, after = (
        {actor["actor_id"]: actor for actor in told[when]} for when in ("before", "after")
    )
    # The fault hit: the node is gone, and with it the processes that were on it.
    assert told["lost"] not in told["alive"]
    assert len(told["alive"]) == 2
    moved = {i for i, actor in before.items() if actor["node"] == told["lost"]}
    assert moved
    for actor_id, old in before.items():
        new = after[actor_id]
        assert new["node"] in told["alive"]
        assert new["experts"] == old["experts"]
        assert (new["generation"] > old["generation"]) == (actor_id in moved)
        assert (new["pid"] != old["pid"]) == (actor_id in moved)
    assert told["failures"] == {}
    assert told["requests"] > 0
    assert told["left"] == []  # serve shutdown ends every expert actor
