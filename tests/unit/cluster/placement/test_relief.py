"""Which experts leave an actor without room for them, and who takes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement.change import Change
from cluster.placement.relief import FreeMemory, plan_relief
from cluster.spec import ExpertKey

SIZE = 10
KEYS = [ExpertKey("m", layer_id, expert_id) for layer_id in range(2) for expert_id in range(4)]
ROOMS = [
    FreeMemory("y", "n2", "n2", math.inf),
    FreeMemory("z", "n2", "n2", math.inf),
    FreeMemory("w", "n3", "w", math.inf),
]


def relief(
    missing: int,
    shares: dict[str, list[ExpertKey]],
    free: dict[str, int],
    rooms: Sequence[FreeMemory] = ROOMS,
    min_copies: int = 1,
) -> tuple[Change, int]:
    return plan_relief("x", missing, shares, {"m": SIZE}, rooms, free, min_copies)


def test_as_many_experts_leave_as_bytes_are_missing_and_a_reserve_stays_free() -> None:
    shares = {"x": KEYS[:4], "y": [], "z": [], "w": []}
    found = relief(25, shares, {"n2": 40, "w": 35})
    # To the memory with the most room; each keeps room for one more.
    assert found[0].added == {"y": [KEYS[0], KEYS[2]], "w": [KEYS[1]]}
    assert found[0].dropped == {"x": KEYS[:3]}


@pytest.mark.parametrize(
    ("rooms", "free", "freed_bytes"),
    [
        (ROOMS[:2], 35, 20),  # actors that share a memory share its room; one expert's stays free
        ([FreeMemory("y", "n2", "n2", 25.0)], 1000, 20),  # the actor's budget
        (ROOMS[:1], 19, 0),
    ],
)
def test_no_more_leave_than_others_have_room_for(
    rooms: list[FreeMemory], free: int, freed_bytes: int
) -> None:
    found = relief(40, {"x": KEYS[:4], "y": [], "z": []}, {"n2": free}, rooms)
    assert found[1] == freed_bytes
    assert bool(found[0].touched()) == bool(freed_bytes)


def test_copies_beyond_the_wanted_number_are_dropped_first() -> None:
    shares = {"x": KEYS[:3], "y": [KEYS[2]], "z": [], "w": []}
    found = relief(10, shares, {"n2": 1000, "w": 1000})
    assert (found[0].added, found[0].dropped) == ({}, {"x": [KEYS[2]]})


def test_a_copy_goes_to_a_node_without_one() -> None:
    shares = {"x": [KEYS[0]], "y": [KEYS[0]], "z": [], "w": []}
    found = relief(10, shares, {"n2": 1000, "w": 50}, min_copies=2)
    assert found[0].added == {"w": [KEYS[0]]}
    # Beside the other copy, where there is no other node.
    found = relief(10, shares, {"n2": 1000, "w": 0}, min_copies=2)
    assert found[0].added == {"z": [KEYS[0]]}


@given(
    missing=st.integers(1, 100),
    free=st.fixed_dictionaries({"n2": st.integers(0, 200), "w": st.integers(0, 200)}),
    held=st.lists(st.tuples(st.sampled_from("yzw"), st.sampled_from(KEYS)), max_size=8),
    min_copies=st.integers(1, 2),
)
def test_no_expert_loses_a_wanted_copy_and_no_memory_overflows(
    missing: int, free: dict[str, int], held: list[tuple[str, ExpertKey]], min_copies: int
) -> None:
    shares: dict[str, list[ExpertKey]] = {"x": list(KEYS), "y": [], "z": [], "w": []}
    for actor_id, key in dict.fromkeys(held):
        shares[actor_id].append(key)
    before = Counter(key for keys in shares.values() for key in keys)
    found = relief(missing, shares, free, min_copies=min_copies)
    after_shares = found[0].on(shares)
    after = Counter(key for keys in after_shares.values() for key in keys)
    assert all(after[key] >= min(min_copies, before[key]) for key in KEYS)
    taken: Counter[str] = Counter()
    for actor_id, keys in found[0].added.items():
        assert not set(keys) & set(shares[actor_id])
        taken[{"y": "n2", "z": "n2", "w": "w"}[actor_id]] += SIZE * len(keys)
    assert all(taken[memory] <= max(0, free[memory] - SIZE) for memory in free)
    assert found[1] == SIZE * (len(KEYS) - len(after_shares["x"]))
    assert found[1] < missing + SIZE
