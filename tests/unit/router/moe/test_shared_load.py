"""The load that a router's dispatchers see of each other."""

from __future__ import annotations

import threading
from collections.abc import Callable

from router.moe.copy_choice import CopyChoice, choose_copies
from router.moe.permute import LayoutCache
from router.moe.shared_load import SharedLoad

LIMIT_S = 60.0


class Lanes:
    """Threads that live on after their work, as those of an engine do."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Lanes:
        return self

    def do(self, work: Callable[[], object]) -> None:
        """Do some work on one more thread."""
        done = threading.Event()

        def run() -> None:
            work()
            done.set()
            self._end.wait(LIMIT_S)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
        assert done.wait(LIMIT_S)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(LIMIT_S)


def test_owed_work_adds_up_over_threads_until_it_is_received() -> None:
    load = SharedLoad([1, 10])
    assert load.work([3, 2]) == [3, 20]
    load.sent({"a": 5, "b": 1})
    load.sent({"a": 3})  # the next layer of the same thread
    with Lanes() as lanes:
        lanes.do(lambda: load.sent({"a": 20, "c": 1}))
        assert load.owed() == {"a": 23, "c": 1}
        load.received()
        assert load.owed() == {"a": 20, "c": 1}


def test_a_copy_is_chosen_by_the_work_of_the_layer_and_that_which_is_owed() -> None:
    # Expert 0 is the most work, and b owes less than a; then a has 12 and b 11.
    chosen, work = choose_copies([("a", "b")] * 3, [9, 1, 2], {"a": 1.0}, (), {"a": 12, "b": 2})
    assert chosen == ["b", "a", "b"]
    assert work == {"b": 11, "a": 1}


def test_lanes_ask_another_copy_for_a_costly_expert_than_the_lanes_that_wait() -> None:
    load = SharedLoad([1, 25, 1])
    copies = [("a", "b")] * 3
    asked: list[str | None] = []

    def ask() -> None:
        lane = CopyChoice(LayoutCache(""), lambda *_: True, load)
        asked.append(lane.choose(copies, [8, 8, 8], (), 0.0)[1])

    with Lanes() as lanes:
        for _ in range(4):
            lanes.do(ask)
    assert asked == ["a", "b", "a", "b"]
    assert load.owed() == {"a": 432, "b": 432}
