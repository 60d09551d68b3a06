"""Which actors are done without, and where copies of one expert come and go: worked by hand."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidRequestError
from cluster.placement.board import Device
from cluster.placement.change import Change
from cluster.placement.drain import change_of_copies, cheapest_to_drain
from cluster.spec import ExpertKey

A, B, C = (ExpertKey("small", 0, i) for i in range(3))
D = ExpertKey("large", 0, 0)
EXPERT_BYTES = {"small": 10, "large": 100}


def test_the_actor_goes_whose_experts_cost_the_fewest_bytes_elsewhere() -> None:
    shares = {"a": [A, B], "b": [D], "c": [C]}
    assert cheapest_to_drain(["a", "b", "c"], 1, shares, EXPERT_BYTES, 1, {}) == ["c"]
    # What others hold often enough costs nothing, until they have gone themselves.
    shares = {"a": [A, B], "b": [A, B], "c": [C]}
    assert cheapest_to_drain(["a", "b", "c"], 1, shares, EXPERT_BYTES, 1, {}) == ["b"]
    assert cheapest_to_drain(["a", "b", "c"], 2, shares, EXPERT_BYTES, 1, {}) == ["b", "c"]
    assert cheapest_to_drain(["a", "b", "c"], 1, shares, EXPERT_BYTES, 2, {}) == ["c"]


def test_of_equals_the_idlest_goes_then_the_last() -> None:
    shares = {"a": [A], "b": [B], "c": [C], "d": []}
    rates = {"a": 5.0, "b": 3.0, "c": 3.0}
    assert cheapest_to_drain(["a", "b", "c"], 3, shares, EXPERT_BYTES, 1, rates) == ["c", "b", "a"]
    assert cheapest_to_drain(["a", "b", "c", "d"], 1, shares, EXPERT_BYTES, 1, rates) == ["d"]
    assert cheapest_to_drain(["a"], 0, shares, EXPERT_BYTES, 1, rates) == []


DEVICES = [Device("a", "n0", 100), Device("b", "n0", 100), Device("c", "n1", 100)]
FREE = {"a": 50.0, "b": 50.0, "c": 50.0}


def change(number: int, shares: dict[str, list[ExpertKey]], **others: object) -> Change:
    free_bytes = {**FREE, **others}
    rates = {"a": 1.0, "b": 2.0, "c": 9.0}
    return change_of_copies([A], number, DEVICES, shares, free_bytes, 10, rates)  # type: ignore[arg-type]


def test_a_copy_comes_to_another_node_first_and_then_to_who_has_least_to_do() -> None:
    held = {"a": [A], "b": [B], "c": [B]}
    assert change(2, held) == Change({"c": [A]}, {})
    assert change(3, held) == Change({"c": [A], "b": [A]}, {})
    assert change(1, held) == Change({}, {})
    assert change(2, held, c=9.0) == Change({"b": [A]}, {})
    with pytest.raises(InvalidRequestError, match="only 2 of 3 actors have room"):
        change(3, held, c=9.0)


def test_a_copy_goes_from_beside_another_first_and_then_from_who_has_most_to_do() -> None:
    held = {"a": [A], "b": [A], "c": [A]}
    assert change(2, held) == Change({}, {"b": [A]})
    assert change(1, held) == Change({}, {"b": [A], "c": [A]})
