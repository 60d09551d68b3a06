"""Which actor is better off on which node, so that copies of an expert are apart."""

from __future__ import annotations

import pytest

from cluster.placement.placement import crowding, less_crowded_node
from cluster.spec import ExpertKey


def keys(*expert_ids: int) -> list[ExpertKey]:
    return [ExpertKey("m", 0, e) for e in expert_ids]


SHARES = {"a": keys(0, 1), "b": keys(1, 2), "c": keys(0, 1, 2)}


def test_crowding_counts_the_copies_that_others_hold_on_a_node() -> None:
    nodes = {"a": "x", "b": "x", "c": "y"}
    assert crowding("a", "x", SHARES, nodes) == 1
    assert crowding("a", "y", SHARES, nodes) == 2
    assert crowding("a", "z", SHARES, nodes) == 0


@pytest.mark.parametrize(
    ("nodes", "candidates", "expected"),
    [
        ({"a": "x", "b": "x", "c": "x"}, ["x", "y"], "y"),
        ({"a": "x", "b": "y", "c": "y"}, ["x", "y"], None),  # it is apart
        ({"a": "x", "b": "x", "c": "y"}, ["x", "y"], None),  # there it would be closer
        ({"a": "x", "b": "x", "c": "y"}, ["x", "y", "z"], "z"),
        ({"a": "x", "b": "x", "c": "x"}, ["x"], None),
        ({"a": "x", "b": "x", "c": "x"}, [], None),
        ({"b": "x"}, ["x", "y"], None),  # where it is nobody knows yet
    ],
)
def test_an_actor_moves_only_to_where_fewer_copies_are(
    nodes: dict[str, str], candidates: list[str], expected: str | None
) -> None:
    assert less_crowded_node("a", candidates, SHARES, nodes) == expected
