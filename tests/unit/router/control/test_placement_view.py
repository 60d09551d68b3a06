"""A replica's copy of the placement: only newer ones are taken, and those who wait are woken."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
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


def view_of(epoch: int, version: int) -> PlacementView:
    view = PlacementView()
    assert view.placement is None
    assert view.wait_newer(None, 0) is False
    view.publish(placement_of(epoch, version))
    return view


@pytest.mark.parametrize(
    ("other", "newest"),
    [((2, 5), (2, 5)), ((2, 4), (2, 5)), ((1, 9), (2, 5)), ((2, 6), (2, 6)), ((3, 0), (3, 0))],
)
def test_only_a_newer_placement_is_taken(other: tuple[int, int], newest: tuple[int, int]) -> None:
    view = view_of(2, 5)
    before = view.placement
    view.publish(placement_of(*other))
    assert view.placement is not None
    assert view.placement.order == newest
    assert (view.placement is before) == (newest == (2, 5))


@pytest.mark.parametrize(
    ("known", "is_there"),
    [(None, True), ((1, 0), True), ((0, 7), True), ((1, 1), False), ((2, 0), False)],
)
def test_who_waits_gets_what_is_there_at_once_or_nothing_in_time(
    known: tuple[int, int] | None, is_there: bool
) -> None:
    than = None if known is None else placement_of(*known)
    assert view_of(1, 1).wait_newer(than, LIMIT_S if is_there else 0.01) is is_there


def test_a_newer_placement_wakes_everyone_who_waits_and_an_older_one_nobody() -> None:
    view, known = view_of(1, 1), placement_of(1, 1)
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
    """Answers watches with placements or other fields from a list; an exception is raised."""

    def __init__(self, *answers: Placement | dict[str, Any] | Exception | None) -> None:
        self.answers = list(answers)
        self.known: list[tuple[int, int]] = []
        self.heard: list[Mapping[str, Heard]] = []
        self.owns: list[Placement | None] = []
        self.suspects: list[tuple[str, int, bool]] = []
        self.exhausted = asyncio.Event()

    async def watch(self, *told: Any) -> dict[str, Any]:
        kind, _, node, known, _, samples, model, kernel_class, heard, own = told
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
        return ANSWER | (answer if isinstance(answer, dict) else {"placement": answer})

    async def suspect(self, actor_id: str, generation: int, hears_others: bool) -> None:
        self.suspects.append((actor_id, generation, hears_others))
        if actor_id == "broken":
            raise ConnectionError("a fault of the test's")


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(placement_view.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(placement_view, "RETRY_S", 0.001)


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine, within a limit; its tasks end with it."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(LIMIT_S):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return run


def watcher_of(
    controller: FakeController,
    view: PlacementView | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
    on_deleted: Callable[[], None] = lambda: None,
    **options: Any,
) -> PlacementWatcher:
    view = view or PlacementView()
    given = "router", view, controller, is_wanted, on_deleted, lambda: SAMPLES, "m@1"
    return PlacementWatcher(*given, lambda: "fused", **options)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@on_loop
async def test_the_watcher_feeds_the_view_says_what_is_known_and_asks_nothing_of_serve() -> None:
    view, asked = PlacementView(), itertools.count()
    controller = FakeController(placement_of(1, 1), None, placement_of(1, 4))
    watcher = watcher_of(controller, view, lambda: next(asked) >= 0)
    await controller.exhausted.wait()
    watcher.stop()
    await asyncio.wait([watcher._task])
    assert view.placement == placement_of(1, 4)
    assert controller.known == [(-1, -1), (1, 1), (1, 1), (1, 4)]
    age_s = view.loop_age_s()
    assert age_s is not None
    assert 0.5 <= age_s < LIMIT_S
    assert next(asked) == 0


@on_loop
async def test_the_uses_of_quotas_are_passed_on_with_each_answer() -> None:
    uses = {"gateway:n:2": {"alice": KeyUse(1, 2, 3, 4.0, 5.0)}}
    controller = FakeController({}, {"uses": uses}, ConnectionError("away"), None)
    heard: list[object] = []
    watcher_of(controller, hear_uses=heard.append)
    await controller.exhausted.wait()
    assert heard == [{}, uses, {}]


@on_loop
async def test_classes_are_known_before_the_placement_that_has_them() -> None:
    class Noted(PlacementView):
        def publish(self, placement: Placement) -> None:
            told.append(self.expert_classes)
            super().publish(placement)

    told: list[frozenset[str]] = []
    controller = FakeController(placement_of(1, 1))
    watcher_of(controller, Noted())
    await controller.exhausted.wait()
    assert told == [{"fused"}]


@on_loop
async def test_while_the_controller_is_away_the_placement_stays_and_watching_goes_on() -> None:
    away = ConnectionError("away"), RuntimeError("restarting")
    view, controller = (
        PlacementView(),
        FakeController(placement_of(1, 1), *away, placement_of(2, 0)),
    )
    watcher_of(controller, view)
    await controller.exhausted.wait()
    assert controller.known == [(-1, -1), (1, 1), (1, 1), (1, 1), (2, 0)]
    assert view.placement == placement_of(2, 0)


@on_loop
async def test_a_controller_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement_view, "CALL_TIMEOUT_S", 0.01)
    controller = FakeController()
    watcher = watcher_of(controller)
    await until(lambda: len(controller.known) >= 3)
    watcher.stop()
    await asyncio.wait([watcher._task])


@on_loop
async def test_suspicions_come_from_any_thread_and_the_controllers_failure_hurts_nobody() -> None:
    controller = FakeController()
    watcher = watcher_of(controller)
    await asyncio.to_thread(watcher.suspect, "broken", 1)
    await asyncio.to_thread(watcher.suspect, "expert-1", 4)
    await until(lambda: len(controller.suspects) >= 2)
    assert controller.suspects == [("broken", 1, False), ("expert-1", 4, False)]


@on_loop
async def test_a_suspicion_that_the_controller_has_not_taken_is_not_told_once_more() -> None:
    controller, taken = FakeController(), asyncio.Event()
    suspect = controller.suspect

    async def slow(*told: Any) -> None:
        await suspect(*told)
        await taken.wait()

    controller.suspect = slow  # type: ignore[method-assign, assignment]
    watcher = watcher_of(controller)
    for generation in (4, 4, 5, 4):
        watcher.suspect("expert-1", generation)
    await until(lambda: len(controller.suspects) >= 2)
    assert [generation for _, generation, _ in controller.suspects] == [4, 5]
    taken.set()
    while len(controller.suspects) < 3:
        watcher.suspect("expert-1", 4)
        await asyncio.sleep(0)
    assert controller.suspects[2][:2] == ("expert-1", 4)


@on_loop
async def test_each_poll_says_which_actors_the_router_hears() -> None:
    controller = FakeController(placement_of(1, 1))
    watcher = watcher_of(controller)
    now_s = time.monotonic()
    answers = [("gone", 1, 1000.0), ("a", 1, 9.0), ("a", 2, 2.0)]
    for actor_id, generation, ago_s in answers + [("b", 1, ago_s) for ago_s in (1.2, 0.6, 0.0)]:
        note_heard(watcher.heard, actor_id, generation, now_s - ago_s)
    await controller.exhausted.wait()
    heard = controller.heard[-1]
    assert {actor_id: generation for actor_id, (generation, _) in heard.items()} == {"a": 2, "b": 1}
    assert heard["a"][1] == pytest.approx(2.0, abs=1.0)
    assert ("gone", 1) not in watcher.heard.at_s
    watcher.suspect("a", 2)
    watcher.suspect("b", 1)
    await until(lambda: len(controller.suspects) >= 2)
    assert [hears_others for *_, hears_others in controller.suspects] == [True, False]


@on_loop
async def test_a_controller_that_asks_for_the_placement_gets_it_once() -> None:
    controller = FakeController(placement_of(1, 1), {"asks_own": True}, placement_of(2, 0))
    watcher_of(controller)
    await controller.exhausted.wait()
    assert controller.owns == [None, None, placement_of(1, 1), None]


@on_loop
async def test_a_deleted_application_is_told_of_once_and_not_watched_any_more() -> None:
    away = [ConnectionError("away")] * 2
    view, controller = PlacementView(), FakeController(placement_of(1, 1), *away, None)
    wanted = iter([True, False])
    told: list[bool] = []
    watcher = watcher_of(controller, view, lambda: next(wanted), lambda: told.append(True))
    await asyncio.wait([watcher._task])
    assert told == [True]
    assert view.placement == placement_of(1, 1)


@on_loop
async def test_the_controllers_word_on_a_deletion_is_enough() -> None:
    controller = FakeController(placement_of(1, 1), {"is_deleted": True})
    asked, told = itertools.count(), list[bool]()
    watcher = watcher_of(
        controller, is_wanted=lambda: next(asked) >= 0, on_deleted=lambda: told.append(True)
    )
    await asyncio.wait([watcher._task])
    assert told == [True]
    assert next(asked) == 0


@on_loop
async def test_a_serve_that_does_not_answer_deletes_nothing_and_stops_no_watcher() -> None:
    release, calls = threading.Event(), itertools.count()
    deleted: list[bool] = []

    def is_wanted() -> bool:
        if next(calls) == 0:
            raise ConnectionError("Serve is away")
        assert release.wait(LIMIT_S)
        return True

    view = PlacementView()
    controller = FakeController(*[ConnectionError("away")] * 6, placement_of(2, 0))
    watcher_of(controller, view, is_wanted, lambda: deleted.append(True))
    await controller.exhausted.wait()
    assert view.placement == placement_of(2, 0)
    release.set()
    assert deleted == []
