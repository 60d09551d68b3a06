"""Ray's autoscaler brings a node for each actor that a pool wants, and takes it when it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run


@pytest.mark.timeout(300)
def test_nodes_come_for_actors_and_go_with_them(tmp_path: Path) -> None:
    told = run("autoscaled", str(tmp_path), limit_s=280.0, RAY_AUTH_MODE="disabled")
    assert told["before"] == 0  # there was no node that an actor could be on
    assert [step["workers"] for step in told["steps"]] == [1, 2, 1]
    assert [len(set(step["actor_nodes"])) for step in told["steps"]] == [1, 2, 1]
    assert told["outcomes"] == ["committed", "committed"]
    assert all(step["is_right"] for step in told["steps"])  # transformers' tokens
