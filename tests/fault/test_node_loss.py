"""A worker node is lost without grace: its experts come back on another, and nothing fails."""

from __future__ import annotations

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0


@pytest.mark.timeout(300)
def test_a_lost_worker_node_costs_time_and_no_request() -> None:
    told = run("node_loss", limit_s=LIMIT_S)
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
