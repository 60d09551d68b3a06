"""A replica's copy of the placement: only newer ones are taken, and those who wait are woken."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.placement.placement import Placement
from cluster.reports import Heard, KeyUse, Samples
from router.control import placement_view
from router.control.placement_view import PlacementView, PlacementWatcher
from router.moe.pace import note_heard

LIMIT_S = 60.0


def placement_of(epoch: int, version: int) -> Placement:
    return Placement(epoch, version, {}, {})


def test_a_view_starts_without_a_placement() -> None:
    view = PlacementView()
    assert view.placement is None
    assert view.wait_newer(None, 0) is False


@pytest.mark.parametrize("older", [(2, 5), (2, 4), (1, 9), (0, 0)])
def test_an_older_placement_or_the_same_is_ignored(older: tuple[int, int]) -> None:
    view, current = PlacementView(), placement_of(2, 5)
    view.publish(current)
    view.publish(placement_of(*older))
    assert view.placement is current


@pytest.mark.parametrize("newer", [(2, 6), (3, 0)])
def test_a_newer_placement_is_taken(newer: tuple[int, int]) -> None:
    view = PlacementView()
    view.publish(placement_of(2, 5))
    view.publish(placement_of(*newer))
    current = view.placement
    assert current is not None
    assert current.order == newer


def test_waiting_for_what_is_there_already_returns_at_once() -> None:
    view = PlacementView()
    view.publish(placement_of(1, 1))
    assert view.wait_newer(None, LIMIT_S) is True
    assert view.wait_newer(placement_of(1, 0), LIMIT_S) is True
    assert view.wait_newer(placement_of(0, 7), LIMIT_S) is True


def test_waiting_ends_without_a_newer_placement_when_the_time_is_over() -> None:
    view = PlacementView()
    view.publish(placement_of(1, 1))
    assert view.wait_newer(placement_of(1, 1), 0.01) is False
    assert view.wait_newer(placement_of(2, 0), 0.01) is False


def test_a_newer_placement_wakes_everyone_who_waits_and_an_older_one_nobody() -> None:
    view, known = PlacementView(), placement_of(1, 1)
    view.publish(known)
    waiting = threading.Semaphore(0)
    wait_for = view._changed.wait_for

    def observed(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        waiting.release()  # under the lock: whoever publishes next finds this one waiting
        return wait_for(predicate, timeout)

    view._changed.wait_for = observed  # type: ignore[method-assign, assignment]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(view.wait_newer, known, LIMIT_S) for _ in range(3)]
        for _ in calls:
            assert waiting.acquire(timeout=LIMIT_S)
        view.publish(placement_of(1, 0))
        view.publish(placement_of(1, 1))
        assert not any(call.done() for call in calls)
        view.publish(placement_of(1, 2))
        assert [call.result(LIMIT_S) for call in calls] == [True] * 3


def test_the_age_of_the_controllers_loop_grows_until_it_is_heard_of_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view, now_s = PlacementView(), 1000.0
    monkeypatch.setattr(placement_view.time, "monotonic", lambda: now_s)
    assert view.loop_age_s() is None
    view.heard(0.5)
    assert view.loop_age_s() == 0.5
    now_s += 7.0
    assert view.loop_age_s() == 7.5
    view.heard(0.25)
    assert view.loop_age_s() == 0.25


def test_an_earlier_controllers_classes_are_ignored() -> None:
    view = PlacementView()
    view.classify(1, frozenset({"unknown"}))
    assert view.expert_classes == {"unknown"}
    view.publish(placement_of(2, 0))
    for epoch, kernel_class, known in ((2, "torch", "torch"), (1, "old", "torch"), (3, "a", "a")):
        view.classify(epoch, frozenset({kernel_class}))
        assert view.expert_classes == {known}


SAMPLES = Samples(1.0, {})
ANSWER = {
    "placement": None, "loop_age_s": 0.5, "is_deleted": False, "asks_own": False, "uses": {},
    "epoch": 2, "expert_classes": frozenset({"fused"}),
}  # fmt: skip


class FakeController:
    """Answers watches with placements from a list; an exception in it is raised."""

    def __init__(self, *answers: dict[str, Any] | Exception | None) -> None:
        self.answers = list(answers)
        self.known: list[tuple[int, int]] = []
        self.heard: list[Mapping[str, Heard]] = []
        self.owns: list[Placement | None] = []
        self.suspects: list[tuple[str, int]] = []
        self.hears_others: list[bool] = []
        self.exhausted = asyncio.Event()

    async def watch(
        self,
        kind: str,
        pid: int,
        node: str,
        known: tuple[int, int],
        timeout_s: float,
        samples: Samples,
        model: str,
        kernel_class: str,
        heard: Mapping[str, Heard],
        own: Placement | None,
    ) -> dict[str, Any]:
        told = (kind, node, samples, model, kernel_class)
        assert told == ("router", "node", SAMPLES, "m@1", "fused")
        self.known.append(known)
        self.heard.append(heard)
        self.owns.append(own)
        if not self.answers:
            self.exhausted.set()
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == "deleted":
            return ANSWER | {"is_deleted": True}
        if isinstance(answer, dict):
            return ANSWER | {"uses": answer}
        if answer == "asks":
            return ANSWER | {"asks_own": True}
        return ANSWER | {"placement": answer}

    async def suspect(self, actor_id: str, generation: int, hears_others: bool) -> None:
        self.suspects.append((actor_id, generation))
        self.hears_others.append(hears_others)
        if actor_id == "broken":
            raise ConnectionError("a fault of the test's")


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(placement_view.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(placement_view, "RETRY_S", 0.001)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(limited())


def watcher_of(
    view: PlacementView,
    controller: FakeController,
    is_wanted: Callable[[], bool] = lambda: True,
    on_deleted: Callable[[], None] = lambda: None,
) -> PlacementWatcher:
    return PlacementWatcher(
        "router", view, controller, is_wanted, on_deleted, lambda: SAMPLES, "m@1", lambda: "fused"
    )


def test_the_watcher_feeds_the_view_and_says_what_is_known() -> None:
    async def test() -> None:
        answers = [placement_of(1, 1), None, placement_of(1, 4)]
        view, controller = PlacementView(), FakeController(*answers)
        watcher = watcher_of(view, controller)
        await controller.exhausted.wait()
        assert view.placement == placement_of(1, 4)
        assert controller.known == [(-1, -1), (1, 1), (1, 1), (1, 4)]
        age_s = view.loop_age_s()
        assert age_s is not None
        assert 0.5 <= age_s < LIMIT_S
        watcher.stop()

    run(test)


def test_the_uses_of_quotas_are_passed_on_with_each_answer() -> None:
    async def test() -> None:
        uses = {"gateway:n:2": {"alice": KeyUse(1, 2, 3, 4.0, 5.0)}}
        controller = FakeController({}, uses, ConnectionError("away"), None)
        heard: list[object] = []
        options = (lambda: SAMPLES, "m@1", lambda: "fused", heard.append)
        watcher = PlacementWatcher(
            "router", PlacementView(), controller, lambda: True, lambda: None, *options
        )
        await controller.exhausted.wait()
        assert heard == [{}, uses, {}]
        watcher.stop()

    run(test)


def test_classes_are_known_before_the_placement_that_has_them() -> None:
    class Noted(PlacementView):
        def publish(self, placement: Placement) -> None:
            told.append(self.expert_classes)
            super().publish(placement)

    told: list[frozenset[str]] = []

    async def test() -> None:
        controller = FakeController(placement_of(1, 1))
        watcher = watcher_of(Noted(), controller)
        await controller.exhausted.wait()
        watcher.stop()

    run(test)
    assert told == [{"fused"}]


def test_while_the_controller_is_away_the_placement_stays_and_watching_goes_on() -> None:
    async def test() -> None:
        view = PlacementView()
        controller = FakeController(
            placement_of(1, 1),
            ConnectionError("away"),
            RuntimeError("restarting"),
            placement_of(2, 0),
        )
        watcher = watcher_of(view, controller)
        await controller.exhausted.wait()
        assert controller.known == [(-1, -1), (1, 1), (1, 1), (1, 1), (2, 0)]
        assert view.placement == placement_of(2, 0)
        watcher.stop()

    run(test)


def test_a_controller_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_view, "CALL_TIMEOUT_S", 0.01)

    async def test() -> None:
        view, controller = PlacementView(), FakeController()
        watcher = watcher_of(view, controller)
        while len(controller.known) < 3:
            await asyncio.sleep(0.001)
        watcher.stop()

    run(test)


def test_suspicions_reach_the_controller_from_any_thread_and_its_failure_hurts_nobody() -> None:
    async def test() -> None:
        view, controller = PlacementView(), FakeController()
        watcher = watcher_of(view, controller)
        await asyncio.to_thread(watcher.suspect, "broken", 1)
        await asyncio.to_thread(watcher.suspect, "expert-1", 4)
        while len(controller.suspects) < 2:
            await asyncio.sleep(0.001)
        assert controller.suspects == [("broken", 1), ("expert-1", 4)]
        watcher.stop()

    run(test)


def test_a_suspicion_that_the_controller_has_not_taken_is_not_told_once_more() -> None:
    async def test() -> None:
        view, controller = PlacementView(), FakeController()
        taken = asyncio.Event()
        suspect = controller.suspect

        async def slow(actor_id: str, generation: int, hears_others: bool) -> None:
            await suspect(actor_id, generation, hears_others)
            await taken.wait()

        controller.suspect = slow  # type: ignore[method-assign]
        watcher = watcher_of(view, controller)
        for generation in (4, 4, 5, 4):
            watcher.suspect("expert-1", generation)
        while len(controller.suspects) < 2:
            await asyncio.sleep(0)
        assert controller.suspects == [("expert-1", 4), ("expert-1", 5)]
        taken.set()
        while len(controller.suspects) < 3:
            watcher.suspect("expert-1", 4)
            await asyncio.sleep(0)
        assert controller.suspects[2] == ("expert-1", 4)
        watcher.stop()

    run(test)


def test_each_poll_says_which_actors_the_router_hears() -> None:
    async def test() -> None:
        controller = FakeController(placement_of(1, 1))
        watcher = watcher_of(PlacementView(), controller)
        now_s = time.monotonic()
        note_heard(watcher.heard, "gone", 1, now_s - 1000.0)
        note_heard(watcher.heard, "a", 1, now_s - 9.0)
        note_heard(watcher.heard, "a", 2, now_s - 2.0)
        for ago_s in (1.2, 0.6, 0.0):
            note_heard(watcher.heard, "b", 1, now_s - ago_s)
        await controller.exhausted.wait()
        heard = controller.heard[-1]
        assert {actor_id: generation for actor_id, (generation, _) in heard.items()} == {
            "a": 2,
            "b": 1,
        }
        assert heard["a"][1] == pytest.approx(2.0, abs=1.0)
        assert ("gone", 1) not in watcher.heard.at_s
        watcher.suspect("a", 2)
        watcher.suspect("b", 1)
        while len(controller.suspects) < 2:
            await asyncio.sleep(0.001)
        assert controller.hears_others == [True, False]
        watcher.stop()

    run(test)


def test_a_controller_that_asks_for_the_placement_gets_it_once() -> None:
    async def test() -> None:
        controller = FakeController(placement_of(1, 1), "asks", placement_of(2, 0))
        watcher = watcher_of(PlacementView(), controller)
        await controller.exhausted.wait()
        assert controller.owns == [None, None, placement_of(1, 1), None]
        watcher.stop()

    run(test)


def test_a_deleted_application_is_told_of_once_and_not_watched_any_more() -> None:
    async def test() -> None:
        answers = [placement_of(1, 1), ConnectionError("away"), ConnectionError("away")]
        view, controller = PlacementView(), FakeController(*answers, None)
        wanted = iter([True, False])
        deleted = asyncio.Event()
        told: list[bool] = []

        def on_deleted() -> None:
            told.append(True)
            deleted.set()

        watcher = watcher_of(view, controller, lambda: next(wanted), on_deleted)
        await deleted.wait()
        await asyncio.wait([watcher._task])
        assert told == [True]
        assert view.placement == placement_of(1, 1)

    run(test)


def test_the_controllers_word_on_a_deletion_is_enough() -> None:
    async def test() -> None:
        def is_wanted() -> bool:
            raise AssertionError("nobody needs to ask Serve")

        told: list[bool] = []
        controller = FakeController(placement_of(1, 1), "deleted")
        watcher = watcher_of(PlacementView(), controller, is_wanted, lambda: told.append(True))
        await asyncio.wait([watcher._task])
        assert told == [True]

    run(test)


def test_nothing_is_asked_of_serve_while_the_controller_answers() -> None:
    async def test() -> None:
        asked: list[bool] = []

        def is_wanted() -> bool:
            asked.append(True)
            return True

        controller = FakeController(placement_of(1, 1), None, None, None)
        watcher = watcher_of(PlacementView(), controller, is_wanted)
        await controller.exhausted.wait()
        assert asked == []
        watcher.stop()

    run(test)


def test_a_serve_that_does_not_answer_deletes_nothing_and_keeps_nobody_from_watching() -> None:
    async def test() -> None:
        release = threading.Event()
        calls = itertools.count()

        def is_wanted() -> bool:
            if next(calls) == 0:
                raise ConnectionError("Serve is away")
            assert release.wait(LIMIT_S)
            return True

        def on_deleted() -> None:
            raise AssertionError("nobody said so")

        away = [ConnectionError("away")] * 6
        controller = FakeController(*away, placement_of(2, 0))
        view = PlacementView()
        watcher = watcher_of(view, controller, is_wanted, on_deleted)
        await controller.exhausted.wait()
        assert view.placement == placement_of(2, 0)
        release.set()
        watcher.stop()

    run(test)
