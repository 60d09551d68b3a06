"""Which copy of an expert is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.moe.copy_choice import AVOID_S, CopyChoice, choose_copies, is_replaceable
from router.moe.permute import LayoutCache

ACTORS = ("a", "b", "c", "d")
LAYERS = st.lists(
    st.tuples(st.lists(st.sampled_from(ACTORS), max_size=4, unique=True), st.integers(0, 50)),
    min_size=1,
    max_size=20,
)


def always_ready(actor_id: str, generation: int) -> bool:
    return True


def test_rows_are_evened_out_as_worked_by_hand() -> None:
    copies = [("a", "b"), ("b", "c"), ("a",), (), ("a", "c"), ("a", "b", "c")]
    # a has to take expert 2. Of the others the largest goes first, to b; then 1 to c; then 4 to c.
    chosen, rows = choose_copies(copies, [0, 5, 6, 9, 3, 8], {}, ())
    assert chosen == ["a", "c", "a", None, "c", "b"]
    assert rows == {"a": 6, "b": 8, "c": 8}


def test_of_equally_loaded_actors_the_one_with_fewer_recent_rows_is_asked_then_the_first() -> None:
    assert choose_copies([("a", "b")], [1], {"a": 2.0, "b": 1.0}, ())[0] == ["b"]
    assert choose_copies([("b", "a")], [1], {"a": 1.0, "b": 1.0}, ())[0] == ["a"]


@given(LAYERS, st.sets(st.sampled_from(ACTORS)))
def test_every_expert_that_has_a_copy_gets_one_of_its_own(
    layer: list[tuple[list[str], int]], avoided: set[str]
) -> None:
    copies, counts = [tuple(actors) for actors, _ in layer], [count for _, count in layer]
    chosen, rows = choose_copies(copies, counts, {}, avoided)
    assert choose_copies(copies, counts, {}, avoided) == (chosen, rows)
    for actors, actor_id in zip(copies, chosen, strict=True):
        assert actor_id in actors if actors else actor_id is None
        assert actor_id not in avoided or not set(actors) - avoided
    assert sum(rows.values()) == sum(n for actors, n in zip(copies, counts, strict=True) if actors)


def test_single_rows_take_turns() -> None:
    copies = CopyChoice(LayoutCache(""), always_ready)
    asked = [copies.choose([("a", "b")], [1], (), 0.0)[0] for _ in range(6)]
    assert asked == ["a", "b"] * 3


def test_an_actor_that_failed_is_avoided_for_a_while_or_until_its_next_generation() -> None:
    copies = CopyChoice(LayoutCache(""), always_ready)
    copies.note_failure("a", 3, now_s=100.0)
    assert copies.failed_lately({"a": 3, "b": 3}, 100.0 + AVOID_S - 0.1) == {"a"}
    assert copies.failed_lately({"a": 4, "b": 3}, 100.0) == frozenset()
    assert copies.failed_lately({"b": 3}, 100.0) == frozenset()
    assert copies.failed_lately({"a": 3, "b": 3}, 100.0 + AVOID_S) == frozenset()


@pytest.mark.parametrize(
    ("expert_ids", "avoided", "expected"),
    [
        ([0], (), True),
        ([0, 1], (), False),
        ([0, 2], (), True),
        ([0, 2], {"b"}, False),
        ([2], "b", True),
    ],
)
def test_other_copies_must_be_there_for_every_expert(
    expert_ids: list[int], avoided: set[str], expected: bool
) -> None:
    copies = [("a", "b"), ("a",), ("a", "b", "c")]
    assert is_replaceable(copies, expert_ids, "a", avoided) == expected
