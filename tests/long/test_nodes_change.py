"""A node lost, one added and one drained by command, under 32 streams: no token changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run

LIMIT_S = 400.0


@pytest.mark.timeout(420)
def test_nodes_that_go_and_come_under_streams_cost_no_token(tmp_path: Path) -> None:
    told = run("nodes_change", str(tmp_path), limit_s=LIMIT_S)
    kept, lost, added = told["kept"], told["lost"], told["added"]
    steps = {step["step"]: step for step in told["steps"]}
    nodes = {name: [node for _, node, _ in step["actors"]] for name, step in steps.items()}
    # The changes happened: Ray had and had not the nodes, and the actors were where they were.
    assert [lost in step["alive"] for step in steps.values()] == [False] * 4
    assert [added in step["alive"] for step in steps.values()] == [False, True, True, True]
    assert kept in steps["added"]["alive"]
    assert kept not in steps["removed"]["alive"]
    assert nodes["lost"] == [kept] * 2
    assert sorted(nodes["added"]) == sorted([kept, kept, added])
    assert set(nodes["drained"]) == {added}
    assert nodes["removed"] == [added] * 3
    assert (told["scaled"], told["drained"]) == ("committed", "committed")
    assert told["failures"] == {}  # all tokens are transformers'
    assert told["requests"] >= 4 * 2 * 32
    assert told["left"] == []
