"""The keeper over a fake pool: every expert stays on a living actor, whatever happens to actors."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from cluster.controller.health import liveness, suspicion
from cluster.controller.lifecycle import keeper as keeper_module
from cluster.controller.lifecycle import loading as loading_module
from cluster.errors import CheckpointError, StaleEpochError
from cluster.reports import LoadingStatus
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    NUM_EXPERTS,
    Cluster,
    FakeActor,
    FakePool,
    happens,
    running,
    settled,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")


async def test_actors_are_started_loaded_and_published() -> None:
    cluster = await started(3)
    placement = cluster.state.placement
    assert placement.epoch == 1
    assert placement.generations == {"expert-0": 1, "expert-1": 1, "expert-2": 1}
    assert all(len(actors) == 1 for actors in placement.holders.values())
    for actor in cluster.pool.actors:
        assert actor.epoch == 1
        held = [k for k, actors in placement.holders.items() if actor.actor_id in actors]
        assert sorted(held) == sorted(actor.keys)


async def test_while_actors_load_status_and_log_tell_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading_module, "NOTICE_S", 0.02)
    monkeypatch.setattr(keeper_module.logger, "propagate", True)
    caplog.set_level("INFO", keeper_module.logger.name)
    cluster = Cluster(2)
    gate = cluster.pool.hold_loads()
    await cluster.start()
    await happens(lambda: sum(actor.loads for actor in cluster.pool.actors) == 2)
    told = (await cluster.controller.status()).loading
    assert told == tuple(LoadingStatus(f"expert-{i}", 0, NUM_EXPERTS, 0) for i in range(2))
    assert len(cluster.state.placement.missing()) == 2 * NUM_EXPERTS
    [first] = cluster.pool.of("expert-0")
    first.keys = [ExpertKey("m", 0, 0), ExpertKey("m", 0, 1)]
    await happens(
        lambda: (
            cluster.controller._status().loading[0] == LoadingStatus("expert-0", 2, NUM_EXPERTS, 20)
        )
    )
    await happens(lambda: "loading: 2 of 8 experts (25%, 0.0 GB) on 2 actors" in caplog.text)
    gate.set()
    await cluster.complete()
    assert cluster.controller._status().loading == ()


async def test_an_actor_that_dies_while_it_loads_loads_no_more() -> None:
    cluster = Cluster(1)
    gate = cluster.pool.hold_loads()
    await cluster.start()
    await happens(lambda: bool(cluster.controller._status().loading))
    cluster.pool.actors[0].alive = False
    gate.set()
    await happens(lambda: len(cluster.pool.actors) == 2)
    await cluster.complete()
    assert cluster.controller._status().loading == ()


async def test_a_dead_actor_is_published_as_lost_and_replaced_by_the_next_generation() -> None:
    cluster = await started()
    before = cluster.state.placement
    gate = cluster.pool.hold_loads()
    cluster.pool.of("expert-1")[0].alive = False
    await happens(lambda: len(cluster.pool.of("expert-1")) == 2)
    status = await cluster.controller.status()
    assert [actor.actor_id for actor in status.actors] == ["expert-0"]
    assert status.missing_experts == NUM_EXPERTS
    gate.set()
    after = await cluster.comes("expert-1", 2)
    assert after.missing() == []
    assert after.generations["expert-0"] == 1
    [loss] = [p for p in cluster.published if before.order < p.order < after.order]
    assert loss.generations == {"expert-0": 1}
    assert loss.missing() == [k for k, a in before.holders.items() if a == ("expert-1",)]
    assert [actor.generation for actor in cluster.pool.of("expert-1")] == [1, 2]


@pytest.mark.parametrize("failure", [CheckpointError("gone", "file"), TimeoutError(), OSError()])
async def test_an_actor_that_fails_to_load_is_killed_and_tried_again_until_it_works(
    failure: Exception,
) -> None:
    cluster = Cluster(1)

    async def fail(actor: FakeActor) -> None:
        if actor.generation < 4:
            raise failure

    cluster.pool.load_gate = fail
    await cluster.start()
    placement = await cluster.complete()
    assert placement.generations == {"expert-0": 4}
    # A detached actor that nobody knows of would hold its memory for ever.
    assert [actor.alive for actor in cluster.pool.actors] == [False, False, False, True]


async def test_actors_that_come_up_at_the_same_time_do_not_undo_each_others_publication() -> None:
    cluster = Cluster(6)
    gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
    cluster.pool.load_gate = lambda actor: gates[actor.actor_id].wait()
    await cluster.start()
    watchers = [
        asyncio.create_task(cluster.controller.watch("router", i, "n", (1, 0), 10))
        for i in range(20)
    ]
    await happens(lambda: sum(actor.loads for actor in cluster.pool.actors) == 6)
    for i in range(6):
        gates[f"expert-{i}"].set()
    await happens(lambda: min(actor.heartbeats for actor in cluster.pool.actors) > 1)
    assert len(cluster.state.placement.generations) == 6
    assert cluster.state.placement.missing() == []
    assert cluster.state.placement.version == 6
    await asyncio.gather(*watchers)


async def test_a_controller_that_was_superseded_stops_and_kills_nothing() -> None:
    cluster = await started()
    for actor in cluster.pool.actors:
        actor.epoch = 2  # a newer controller has been here
    await cluster.superseded()
    assert [(a.alive, a.killed) for a in cluster.pool.actors] == [(True, False)] * 2
    assert cluster.state.placement.missing() == []
    # Serve is to end it, and nobody is to take its word for anything.
    for call in (
        cluster.controller.check_health(),
        cluster.controller.status(),
        cluster.controller.load(),
        cluster.controller.watch("router", 1, "n", (-1, -1), 0),
    ):
        with pytest.raises(StaleEpochError):
            await call
    refusal = await cluster.controller.drain("expert-0", False)
    assert refusal["error"]["field"] == "epoch"


async def test_a_superseded_controller_does_not_take_actors_while_it_starts() -> None:
    pool = FakePool()
    actor = pool.add("expert-0", 1, 5)

    async def overtaken(_: FakeActor) -> None:
        actor.epoch = 9

    pool.load_gate = overtaken
    async with running(1, pool) as cluster:
        await cluster.superseded()
        assert (actor.alive, actor.killed, actor.epoch) == (True, False, 9)
        assert pool.actors == [actor]


async def test_a_suspicion_brings_the_next_heartbeat_forward_and_who_answers_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "HEARTBEAT_PERIOD_S", 3600)
    cluster = await started()
    [first], [second] = cluster.pool.of("expert-0"), cluster.pool.of("expert-1")
    await happens(lambda: first.heartbeats == second.heartbeats == 1)
    await cluster.controller.suspect("expert-0", 1)
    await happens(lambda: first.heartbeats == 2)
    assert (cluster.state.placement.generations["expert-0"], first.killed) == (1, False)
    first.alive = False
    # About an older generation, or nobody: not worth a look.
    await cluster.controller.suspect("expert-0", 0)
    await cluster.controller.suspect("nobody", 1)
    assert not any(event.is_set() for event in cluster.keeper._heartbeat_due.values())
    await cluster.controller.suspect("expert-0", 1)
    await cluster.comes("expert-0", 2)
    assert second.heartbeats == 1


async def test_a_silent_actor_is_replaced_sooner_while_a_router_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "SILENT_S", 3600)
    monkeypatch.setattr(liveness, "SUSPECTED_S", 0.05)
    cluster = await started(5)
    [suspected], [idle] = cluster.pool.of("expert-0"), cluster.pool.of("expert-1")
    suspected.hung = idle.hung = True
    await cluster.controller.suspect("expert-0", 1)
    await cluster.comes("expert-0", 2)
    assert (suspected.killed, idle.killed) == (True, False)
    # The word on the first generation says nothing of the second.
    [_, successor] = cluster.pool.of("expert-0")
    successor.hung = True
    beats = successor.heartbeats
    await cluster.controller.suspect("expert-0", 1)
    await happens(lambda: successor.heartbeats > beats)
    assert not await replaced_within(cluster, successor, 10 * liveness.SUSPECTED_S)


async def test_a_routers_word_counts_only_while_it_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "SILENT_S", 3600)
    monkeypatch.setattr(liveness, "SUSPECTED_S", 0.1)
    monkeypatch.setattr(suspicion, "SUSPICION_S", 0.05)
    cluster = await started(1)
    [actor] = cluster.pool.actors
    actor.hung = True
    await cluster.controller.suspect("expert-0", 1)
    assert not await replaced_within(cluster, actor, 5 * liveness.SUSPECTED_S)
    while not actor.killed:
        await cluster.controller.suspect("expert-0", 1)
        await asyncio.sleep(0.01)


async def replaced_within(cluster: Cluster, actor: FakeActor, timeout_s: float) -> bool:
    """Watch for a while whether an actor is ended."""
    try:
        async with asyncio.timeout(timeout_s):
            await happens(lambda: actor.killed)
    except TimeoutError:
        return False
    return True


async def test_others_take_what_nobody_holds_of_an_actor_whose_successor_finds_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "PLACE_NOTICE_S", 0.01)
    cluster = await started(3)
    before = cluster.state.placement
    # Ray has no place for it, so it answers nothing.
    gate = cluster.pool.hold_loads("expert-1", is_hung=True)
    cluster.pool.of("expert-1")[0].alive = False
    lost = await cluster.until(lambda p: "expert-1" not in p.generations)
    assert lost.missing()
    after = await cluster.complete()
    assert set(after.generations) == {"expert-0", "expert-2"}
    held = {key for key, actors in before.holders.items() if "expert-1" not in actors}
    assert {key: after.holders[key] for key in held} == {key: before.holders[key] for key in held}
    assert cluster.state.shares["expert-1"] == []
    gate.set()
    await cluster.comes("expert-1", 2)
    placement = await settled(cluster, 1)
    assert all(len(actors) == 1 for actors in placement.holders.values())


async def test_an_actor_that_waits_for_its_first_place_keeps_its_share(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper_module, "PLACE_NOTICE_S", 0.01)
    pool = FakePool()
    # Ray has no place for it, so it answers nothing.
    gate = pool.hold_loads("expert-1", is_hung=True)
    async with running(2, pool) as cluster:
        await happens(lambda: caplog.text.count("expert-1 waits for resources: it needs GPU 1") > 1)
        assert "expert-0 waits" not in caplog.text
        assert cluster.state.shares["expert-1"]
        assert list(cluster.state.placement.missing())
        gate.set()
        await cluster.complete()


async def test_a_successor_for_which_its_predecessors_node_has_no_room_comes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "PLACE_NOTICE_S", 0.01)
    pool = FakePool("n1", "n2")
    cluster = await started(2, pool, min_copies=2)

    async def waits(actor: FakeActor) -> None:
        actor.hung = actor.node == "n1"  # another program took the room
        while actor.hung and actor.alive:
            await asyncio.sleep(0.001)

    pool.load_gate = waits
    pool.node_ids = ["n2"]
    pool.of("expert-0")[0].alive = False
    await cluster.comes("expert-0", 3)
    successors = [(a.generation, a.node, a.alive) for a in pool.of("expert-0")[1:]]
    assert successors == [(2, "n1", False), (3, "n2", True)]


@pytest.mark.parametrize(
    ("rebalance_period_s", "num_actors", "expected_s"),
    [(None, 2, 1.0), (60.0, 2, 0.25), (0.1, 2, 0.1), (0.1, 80, 0.2), (0.1, 1000, 1.0)],
)
def test_heartbeats_come_as_often_as_copies_follow_the_load(
    monkeypatch: pytest.MonkeyPatch,
    rebalance_period_s: float | None,
    num_actors: int,
    expected_s: float,
) -> None:
    monkeypatch.setattr(keeper_module, "HEARTBEAT_PERIOD_S", 1.0)
    cluster = Cluster(num_actors, rebalance_period_s=rebalance_period_s)
    assert cluster.keeper._heartbeat_period_s() == pytest.approx(expected_s)
