"""Where an actor's successor starts."""

from __future__ import annotations

import pytest

from cluster.placement.successor import node_for_successor
from cluster.spec import ExpertKey

A, B = ExpertKey("m", 0, 0), ExpertKey("m", 0, 1)
SHARES = {"x": [A, B], "y": [A], "z": [B], "w": []}
NODES = {"x": "n1", "y": "n2", "z": "n3", "w": "n3"}


@pytest.mark.parametrize(
    ("candidates", "avoided", "min_copies", "expected"),
    [
        (["n2", "n3"], {}, 1, None),  # Ray spreads actors by itself
        (["n2", "n3"], {}, 2, "n1"),  # copies stay apart
        (["n2", "n3"], {"n2": 9.0}, 2, "n1"),
        (["n1", "n2"], {"n1": 9.0}, 1, "n2"),
        (["n1", "n2", "n4"], {"n1": 9.0}, 2, "n4"),  # no other copy of its experts
        (["n2", "n3"], {"n1": 9.0}, 2, "n2"),  # one copy each; fewer actors
        (["n1", "n2", "n3"], {"n3": 9.0}, 1, "n1"),  # no copy but its own
        (["n1"], {"n1": 9.0}, 1, None),
        (["n1"], {"n1": 9.0}, 2, "n1"),  # there is no other
        (["n1", "n2", "n3"], {"n1": 7.0, "n2": 9.0, "n3": 8.0}, 2, "n3"),  # it is over first
        ([], {"n1": 9.0}, 1, None),
    ],
)
def test_a_successor_goes_where_no_actor_ended_badly_and_few_copies_are(
    candidates: list[str], avoided: dict[str, float], min_copies: int, expected: str | None
) -> None:
    found = node_for_successor("x", candidates, avoided, SHARES, NODES, min_copies, True)
    assert found == expected


@pytest.mark.parametrize(
    ("avoided", "min_copies", "expected"),
    [
        ({"n1": 9.0, "n2": 8.0}, 2, "n1"),  # else all would gather on n2
        ({"n1": 9.0, "n2": 8.0}, 1, None),
        ({"n1": 9.0}, 2, "n2"),
    ],
)
def test_an_actor_that_blames_no_place_leaves_its_node_for_a_good_one_alone(
    avoided: dict[str, float], min_copies: int, expected: str | None
) -> None:
    candidates = ["n1", "n2"]
    found = node_for_successor("x", candidates, avoided, SHARES, NODES, min_copies, False)
    assert found == expected
