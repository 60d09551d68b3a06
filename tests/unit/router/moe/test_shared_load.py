"""The load that a router's dispatchers see of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from router.moe.copy_choice import CopyChoice, choose_copies
from router.moe.permute import LayoutCache
from router.moe.shared_load import SharedLoad

LIMIT_S = 60.0


@pytest.fixture
def on_one_more_thread() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Does work on a thread of its own, which lives on, as those of an engine do."""
    with ExitStack() as threads:
        yield lambda work: threads.enter_context(ThreadPoolExecutor(1)).submit(work).result(LIMIT_S)


def test_owed_work_adds_up_over_threads_until_it_is_received(
    on_one_more_thread: Callable[[Callable[[], object]], object],
) -> None:
    load = SharedLoad([1, 10])
    assert load.work([3, 2]) == [3, 20]
    load.sent({"a": 5, "b": 1})
    load.sent({"a": 3})  # the next layer of the same thread
    on_one_more_thread(lambda: load.sent({"a": 20, "c": 1}))
    assert load.owed() == {"a": 23, "c": 1}
    load.received()
    assert load.owed() == {"a": 20, "c": 1}


def test_a_copy_is_chosen_by_the_work_of_the_layer_and_that_which_is_owed() -> None:
    # Expert 0 is the most work, and b owes less than a; then a has 12 and b 11.
    chosen, work = choose_copies([("a", "b")] * 3, [9, 1, 2], {"a": 1.0}, (), {"a": 12, "b": 2})
    assert chosen == ["b", "a", "b"]
    assert work == {"b": 11, "a": 1}


def test_lanes_ask_another_copy_for_a_costly_expert_than_the_lanes_that_wait(
    on_one_more_thread: Callable[[Callable[[], object]], object],
) -> None:
    load = SharedLoad([1, 25, 1])
    copies = [("a", "b")] * 3
    asked: list[str | None] = []

    def ask() -> None:
        lane = CopyChoice(LayoutCache(""), lambda *_: True, load)
        asked.append(lane.choose(copies, [8, 8, 8], (), 0.0)[1])

    for _ in range(4):
        on_one_more_thread(ask)
    assert asked == ["a", "b", "a", "b"]
    assert load.owed() == {"a": 432, "b": 432}
