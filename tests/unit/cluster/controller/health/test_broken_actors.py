"""The controller over a fake pool, whose actors break, die again and again, or have no room."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from ray.exceptions import RaySystemError

from cluster.controller.health import deaths as deaths_module
from cluster.controller.health.deaths import BROKEN_TESTS
from cluster.controller.lifecycle import keeper as keeper_module
from cluster.controller.lifecycle import processes
from cluster.controller.records.last_words import LastWords
from cluster.errors import CheckpointError, NoRoomError
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    LIMIT_S,
    NUM_EXPERTS,
    Cluster,
    FakeActor,
    FakePool,
    away,
    beats,
    happens,
    settled,
    started,
)
from tests.unit.virtual_time import VirtualLoop

pytestmark = pytest.mark.usefixtures("short_periods")


async def test_an_actor_whose_self_tests_fail_in_a_row_is_published_as_lost_and_replaced() -> None:
    cluster = await started()
    before = cluster.state.placement
    [broken] = cluster.pool.of("expert-1")
    broken.failed_tests = BROKEN_TESTS - 1
    await beats(broken)
    assert not broken.killed
    [failing] = (await cluster.controller.status()).failing
    assert (failing.actor_id, failing.reason) == ("expert-1", "the device is gone")
    broken.failed_tests = BROKEN_TESTS
    after = await cluster.comes("expert-1", 2)
    assert broken.killed
    assert after.generations["expert-0"] == 1
    losses = [p for p in cluster.published if before.order < p.order < after.order]
    assert [loss.generations for loss in losses] == [{"expert-0": 1}]


@pytest.mark.parametrize("min_copies", [1, 2])
async def test_the_successor_of_a_broken_actor_goes_to_another_node(min_copies: int) -> None:
    pool = FakePool("n1", "n2")
    cluster = await started(2, pool, min_copies)
    [broken] = pool.of("expert-0")
    assert broken.node == "n1"
    pool.node_ids = ["n1", "n3"]
    broken.failed_tests = BROKEN_TESTS
    await cluster.comes("expert-0", 2)
    assert [a.node for a in pool.of("expert-0")] == ["n1", "n3"]


@pytest.mark.parametrize("has_free_device", [True, False])
async def test_where_there_is_no_other_node_a_broken_actor_holds_its_device_until_there_is_another(
    has_free_device: bool,
) -> None:
    pool = FakePool("n1")
    cluster = await started(1, pool)
    [broken] = pool.actors
    alive: list[bool] = []
    pool.created = lambda actor: alive.append(not broken.killed)
    if not has_free_device:
        pool.nodes_for = lambda spec: [] if broken.alive else ["n1"]  # type: ignore[method-assign]
    broken.failed_tests = BROKEN_TESTS
    await cluster.comes("expert-0", 2)
    assert (alive, broken.killed) == ([has_free_device], True)
    assert [(a.node, a.alive) for a in pool.actors] == [("n1", False), ("n1", True)]


@pytest.mark.parametrize("part", ["nodes", "ledger"])
async def test_a_broken_actor_is_replaced_though_ray_does_not_answer_for_a_while(part: str) -> None:
    pool = FakePool("n1")
    cluster = await started(1, pool)
    [broken] = pool.actors
    with away(pool, "nodes_for") if part == "nodes" else away(pool.store, "create") as asked:
        broken.failed_tests = BROKEN_TESTS
        await happens(lambda: len(asked) > 0)
    await cluster.until(lambda p: p.generations.get("expert-0", 1) > 1)
    assert not broken.alive


async def test_a_spare_device_that_does_not_come_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "PLACE_NOTICE_S", 0.02)
    monkeypatch.setattr(processes, "START_NOTICE_S", 0.2)
    pool = FakePool("n1")
    cluster = await started(1, pool)
    [broken] = pool.actors
    pool.created = lambda actor: setattr(actor, "hung", not broken.killed)
    broken.failed_tests = BROKEN_TESTS
    await cluster.comes("expert-0", 3)
    assert [a.alive for a in pool.of("expert-0")] == [False, False, True]


async def test_a_loop_of_deaths_backs_off_though_each_successor_comes_up_and_status_counts_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deaths_module, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(deaths_module, "MAX_RETRY_S", 0.16)
    cluster = await started()
    began_at_s = time.monotonic()
    for generation in range(1, 7):
        await cluster.comes("expert-0", generation)
        cluster.pool.of("expert-0")[-1].alive = False
    await happens(lambda: "expert-0" not in cluster.state.placement.generations)
    [failing] = (await cluster.controller.status()).failing
    assert (failing.actor_id, failing.deaths, failing.reason) == ("expert-0", 6, "died")
    assert 0 < failing.retry_in_s <= 0.16
    await cluster.comes("expert-0", 7)
    delays_s = [0.0, 0.02, 0.04, 0.08, 0.16, 0.16]
    assert sum(delays_s) <= time.monotonic() - began_at_s + 1e-6 < sum(delays_s) + 0.5


@pytest.mark.parametrize("store", ["answers", "is away", "hangs"])
async def test_the_reason_with_which_an_actor_ended_itself_is_its_deaths(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, store: str
) -> None:
    monkeypatch.setattr(processes, "LEDGER_TIMEOUT_S", 0.02)
    monkeypatch.setattr(deaths_module, "FIRST_RETRY_S", LIMIT_S)
    monkeypatch.setattr(deaths_module, "MAX_RETRY_S", LIMIT_S)
    goes_on, words = threading.Event(), "its device failed (uncorrectable ECC error)"
    cluster = Cluster(2, num_gpus=1.0)
    pool, take = cluster.pool, cluster.pool.last_words
    loop = cast(VirtualLoop, asyncio.get_running_loop())

    def last_words(actor_id: str, generation: int) -> str:
        if store == "is away":
            raise RaySystemError("the store is away")
        if store == "hangs":
            loop.hang(goes_on)
        return take(actor_id, generation)

    pool.last_words = last_words  # type: ignore[method-assign]
    await cluster.start()
    await cluster.complete()
    for generation in (1, 2):
        LastWords("app", pool.store).leave("expert-0", generation, f"{words} {generation}")
        pool.of("expert-0")[-1].alive = False
        await cluster.until(lambda p: "expert-0" not in p.generations)
        if generation == 1:
            await cluster.comes("expert-0", 2)
    await happens(lambda: len(cluster.keeper.deaths.status(time.monotonic())) == 1)
    [failing] = (await cluster.controller.status()).failing
    reason = f"{words} 2" if store == "answers" else "died"
    assert (failing.actor_id, failing.deaths, failing.reason) == ("expert-0", 2, reason)
    goes_on.set()
    await cluster.stop()
    said = f"expert-0 ended itself: {words} 1" in caplog.text
    assert said == (store == "answers")
    assert ("its exit reason cannot be read" in caplog.text) == (store != "answers")


async def test_words_of_an_earlier_deployment_are_not_taken_for_those_of_todays_actor() -> None:
    cluster = Cluster(2, num_gpus=1.0)
    LastWords("app", cluster.pool.store).leave("expert-0", 1, "its device failed long ago")
    await cluster.start()
    await cluster.complete()
    for generation in (1, 2):
        cluster.pool.of("expert-0")[-1].alive = False
        await cluster.comes("expert-0", generation + 1)
        assert cluster.keeper.deaths._actors["expert-0"].last.reason == "died"


async def test_nobody_asks_for_the_words_of_actors_without_a_device() -> None:
    cluster = await started(2)
    cluster.pool.last_words = None  # type: ignore[assignment, method-assign]
    cluster.pool.of("expert-0")[0].alive = False
    await cluster.comes("expert-0", 2)


async def test_a_node_on_which_an_actor_dies_again_is_avoided_by_its_next_successor() -> None:
    pool = FakePool("n1", "n2")
    cluster = await started(2, pool, min_copies=2)
    for generation in (2, 3):
        pool.of("expert-0")[-1].alive = False
        await cluster.comes("expert-0", generation)
    assert [a.node for a in pool.of("expert-0")] == ["n1", "n1", "n2"]


def lacking(cluster: Cluster, room: dict[str, int]) -> Callable[[FakeActor], Awaitable[None]]:
    """Return a gate at which actors have room for so many experts, and others for all."""

    async def load(actor: FakeActor) -> None:
        share = cluster.state.shares[actor.actor_id]
        free = room.get(actor.actor_id, len(share))
        if len(share) > free:
            raise NoRoomError(f"cpu of {actor.node}", 10 * len(share), 10 * free, "f")

    return load


async def test_experts_for_which_an_actor_has_no_room_move_to_one_that_has() -> None:
    pool = FakePool("n1", "n2")
    cluster = Cluster(2, pool)
    pool.load_gate = lacking(cluster, {"expert-1": 1})
    await cluster.start()
    await cluster.complete()
    await settled(cluster, 1)
    shares = cluster.state.shares
    assert {a: len(keys) for a, keys in shares.items()} == {"expert-0": 7, "expert-1": 1}
    assert (await cluster.controller.status()).failing == ()
    [change] = (await cluster.controller.load()).changes
    assert change.what == "expert-1 hands off experts that it has no room for"
    assert "lacks 30 bytes of the 40" in change.reason
    assert {(m.actor_id, m.is_added) for m in change.moves} == {
        ("expert-0", True),
        ("expert-1", False),
    }


async def test_where_nobody_has_room_status_says_which_bytes_are_missing_where() -> None:
    pool = FakePool("n1", "n2")
    cluster = Cluster(2, pool)
    room = {"expert-1": 1}
    pool.load_gate = lacking(cluster, room)
    pool.created = lambda actor: setattr(actor, "free_bytes", 25)  # one expert, and the reserve
    await cluster.start()
    await happens(lambda: len(pool.of("expert-1")) > 4)
    status = await cluster.controller.status()
    [failing] = status.failing
    assert (failing.needed_bytes, failing.missing_bytes) == (10 * NUM_EXPERTS, 30)
    assert failing.reason == "f: cpu of n2 lacks 30 bytes of the 40 that are needed"
    assert (failing.node, failing.deaths > 3) == ("n2", True)
    assert status.missing_experts == NUM_EXPERTS
    assert len(cluster.state.shares["expert-1"]) == NUM_EXPERTS
    room.clear()
    await cluster.complete()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
async def test_an_actor_of_the_same_memory_takes_nothing(device: str) -> None:
    """Actors on one node's processors share a memory, and those that have shares of one card."""
    pool = FakePool("n1")
    pool.created = lambda actor: setattr(actor, "device", device)
    cluster = Cluster(2, pool)
    room = {"expert-1": 1}
    pool.load_gate = lacking(cluster, room)
    await cluster.start()
    await happens(lambda: len(pool.of("expert-1")) > 3)
    assert [key for key in cluster.pool.of("expert-0")[0].keys if key.layer_id > 1] == []
    assert len(cluster.state.shares["expert-0"]) == NUM_EXPERTS
    # On devices of their own both are on one node.
    pool.of("expert-0")[0].device = "cuda:0"
    await happens(lambda: cluster.state.reports["expert-0"].device == "cuda:0")
    await cluster.complete()
    assert len(cluster.state.shares["expert-0"]) == 2 * NUM_EXPERTS - 1


async def test_a_relief_that_fails_moves_nothing_and_is_tried_again() -> None:
    pool = FakePool("n1", "n2")
    cluster = Cluster(2, pool)
    gate = lacking(cluster, {"expert-1": 1})
    refusals = 2

    async def load(actor: FakeActor) -> None:
        nonlocal refusals
        if actor.actor_id == "expert-0" and actor.loads > 1 and refusals:
            refusals -= 1
            raise NoRoomError("cpu of n1", 2, 1, "f")
        await gate(actor)

    pool.load_gate = load
    await cluster.start()
    await cluster.complete()
    assert refusals == 0
    assert cluster.state.shares["expert-1"] != []
    assert ExpertKey("m", 0, 0) in cluster.state.placement.holders


@pytest.mark.parametrize(
    ("failure", "reason", "missing_bytes"),
    [
        (NoRoomError("cpu of n1", 80, 30, "f"), "cpu of n1 lacks 50 bytes", 50),
        (CheckpointError("the disk fails", "model.safetensors"), "the disk fails", 0),
    ],
    ids=["no room", "no file"],
)
async def test_an_actor_that_serves_and_cannot_load_more_lives_on(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str, missing_bytes: int
) -> None:
    monkeypatch.setattr(keeper_module, "LOAD_RETRY_S", 0.05)
    pool = FakePool("n1")
    cluster = Cluster(1, pool)
    held = [ExpertKey("m", 0, e) for e in range(3)]
    actor = pool.add("expert-0", 1, 1, node="n1", keys=held)

    async def fail(actor: FakeActor) -> None:
        raise failure

    pool.load_gate = fail
    await cluster.start()
    await happens(lambda: actor.loads > 4)
    assert (actor.alive, len(pool.actors)) == (True, 1)
    assert cluster.state.placement.held()["expert-0"] == held
    [failing] = (await cluster.controller.status()).failing
    assert reason in failing.reason
    assert (failing.missing_bytes, failing.deaths) == (missing_bytes, 0)
    pool.load_gate = None
    await cluster.complete()
    assert (await cluster.controller.status()).failing == ()
    assert len(pool.actors) == 1


async def test_an_actor_that_serves_is_relieved_of_experts_that_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its keeper has it unload them meanwhile: it must not wait for the relief itself."""
    monkeypatch.setattr(keeper_module, "LOAD_RETRY_S", 0.05)
    pool = FakePool("n1", "n2")
    cluster = Cluster(2, pool)
    keys = cluster.spec.models[0].experts.expert_keys()
    first = pool.add("expert-0", 1, 1, node="n1", keys=keys[:4])
    second = pool.add("expert-1", 1, 1, node="n2", keys=keys[4:7])
    first.free_bytes = second.free_bytes = 10_000
    pool.load_gate = lacking(cluster, {"expert-1": 2})
    await cluster.start()
    await cluster.complete()
    await happens(lambda: len(second.keys) == 2)
    assert len(first.keys) == 6
    assert (first.alive, second.alive, len(pool.actors)) == (True, True, 2)
    await happens(lambda: (cluster.controller._keeper.deaths.status(time.monotonic())) == ())
