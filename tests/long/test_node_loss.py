"""A worker node is lost without grace, and the checkpoint lies on another node only.

The experts come back on a node that is left, from the one that has the checkpoint; nothing fails,
and where they have copies on another worker nothing waits either.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.programs import run

LIMIT_S = 280.0
ALL_EXPERTS = 24
SHARES = {"fast-0": 10, "fast-1": 9, "slow-0": 5}


@pytest.mark.timeout(300)
def test_a_lost_worker_node_costs_time_and_no_request(tmp_path: Path) -> None:
    told = run("node_loss", str(tmp_path), "1", limit_s=LIMIT_S)
    before, after = (
        {actor["actor_id"]: actor for actor in told[when]} for when in ("before", "after")
    )
    # The fault hit: the node is gone, and with it the processes that were on it.
    assert told["lost"] not in told["alive"]
    assert len(told["alive"]) == 3
    moved = {i for i, actor in before.items() if actor["node"] == told["lost"]}
    assert moved
    for actor_id, old in before.items():
        new = after[actor_id]
        assert new["node"] in told["alive"]
        assert new["experts"] == old["experts"]
        assert (new["generation"] > old["generation"]) == (actor_id in moved)
        assert (new["pid"] != old["pid"]) == (actor_id in moved)
    assert told["failures"] == {}  # all tokens are those of transformers on the whole checkpoint
    assert told["requests"] > 0
    # Each pool's actors hold what their budgets allow, in proportion.
    assert {i: len(actor["experts"]) for i, actor in before.items()} == SHARES
    # Every actor fetched its own experts and nothing else, before and after; so does the successor
    # of one whose reader is killed. Nothing was written where there was nothing.
    shares = {i: len(actor["experts"]) * told["expert_bytes"] for i, actor in before.items()}
    assert told["fetched_before"] == told["fetched_after"] == told["fetched_again"] == shares
    assert not told["is_reader_alive"]
    assert told["readers_left"] == 0
    assert told["written"] == []
    assert told["left"] == []  # serve shutdown ends every expert actor


@pytest.mark.timeout(300)
def test_copies_on_another_node_outlive_a_worker_node(tmp_path: Path) -> None:
    told = run("node_loss", str(tmp_path), "2", limit_s=LIMIT_S)
    before, after = told["before"], told["after"]
    assert told["lost"] not in told["alive"]
    # Each expert was on both workers, and is on two actors again.
    assert len({actor["node"] for actor in before}) == 2
    assert [len(actor["experts"]) for actor in (*before, *after)] == [ALL_EXPERTS] * 4
    [lost] = [actor for actor in before if actor["node"] == told["lost"]]
    [kept] = [actor for actor in before if actor["node"] != told["lost"]]
    successors = {actor["actor_id"]: actor for actor in after}
    assert successors[kept["actor_id"]]["pid"] == kept["pid"]
    assert successors[lost["actor_id"]]["generation"] > lost["generation"]
    assert told["failures"] == {}  # all tokens are those of transformers
    assert told["requests"] > 0
    assert told["longest_wait_s"] < told["back_s"]  # nobody waited for the successor
    assert told["left"] == []
