"""Copies on several nodes: a node goes without a word, and no request fails."""

from __future__ import annotations

import pytest

from tests.cluster_fixture import NUM_ACTORS, RANDOM, ServedCluster, Shape, greedy
from tests.fault.faults import PROMPTS, expected_tokens, longest_gap_s, start_streams

pytestmark = [
    pytest.mark.parametrize(
        "served_session", [Shape(min_copies=2, workers=2)], ids=str, indirect=True
    ),
    pytest.mark.timeout(300),
]


def test_copies_live_on_different_nodes_and_outlive_one(served: ServedCluster) -> None:
    told = served.status()
    assert len({actor.node for actor in told.actors}) == NUM_ACTORS
    victim = next(actor for actor in told.actors if actor.node in served.removals)
    streams = start_streams(served)
    served.removals[victim.node]()
    assert not any(stream.ended for stream in streams)
    expected = expected_tokens(served)
    assert [stream.result() for stream in streams] == expected
    print(f"longest gap with a node's loss: {longest_gap_s(streams):.3f} s")
    new = served.crowd(RANDOM, PROMPTS, [greedy(20)] * len(PROMPTS))
    assert new == [tokens[:20] for tokens in expected]
    after = served.wait_whole()
    assert victim.node not in {actor.node for actor in after.actors}
    assert served.actors()[victim.actor_id].generation > victim.generation
