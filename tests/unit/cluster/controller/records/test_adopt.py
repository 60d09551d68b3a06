"""A next controller over a fake pool: it adopts living actors, and nothing goes backwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.spec import ActorReport, ModelExperts
from tests.unit.cluster.controller.fakes import (
    NUM_EXPERTS,
    Cluster,
    FakeActor,
    FakePool,
    happens,
    running,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")


async def test_living_actors_of_the_same_configuration_are_adopted_under_a_higher_epoch() -> None:
    pool = FakePool()
    keys = ModelExperts("m", (0, 1), NUM_EXPERTS, 10).expert_keys()
    old = pool.add("expert-0", 7, 41, keys=keys[:2])
    cluster = await started(2, pool)
    placement = cluster.state.placement
    assert placement.epoch == 42
    assert placement.generations == {"expert-0": 7, "expert-1": 1}
    assert [actor.actor_id for actor in pool.actors] == ["expert-0", "expert-1"]
    assert (old.alive, old.killed, old.epoch) == (True, False, 42)
    old.alive = False
    await cluster.comes("expert-0", 8)


@pytest.mark.parametrize("min_copies", [1, 2])
async def test_a_new_controller_comes_to_the_same_copies_and_calls_no_living_experts_lost(
    min_copies: int,
) -> None:
    pool = FakePool("n1", "n2", "n3")
    async with running(3, pool, min_copies) as first:
        before = await first.complete()
    async with running(3, pool, min_copies) as second:
        taken_over = second.state.placement  # before any keeper has had its turn
        assert taken_over.epoch == before.epoch + 1
        assert taken_over.missing() == []
        assert taken_over.generations == before.generations
        after = await second.complete()
        assert len(pool.actors) == 3
        assert {k: set(v) for k, v in after.holders.items()} == {
            k: set(v) for k, v in before.holders.items()
        }


@pytest.mark.parametrize("lost", [["expert-0"], ["expert-0", "expert-1"]], ids=["one", "all"])
async def test_actors_that_died_while_the_controller_was_away_get_their_next_generations(
    lost: list[str],
) -> None:
    pool = FakePool()
    async with running(2, pool) as first:
        before = await first.complete()
    for actor_id in lost:
        pool.of(actor_id)[0].alive = False
    after = (await started(2, pool)).state.placement
    assert after.order > before.order
    assert after.epoch == before.epoch + 1
    assert after.generations == {"expert-0": 1, "expert-1": 1} | dict.fromkeys(lost, 2)


async def test_actors_that_hang_are_waited_for_together() -> None:
    pool = FakePool()
    for place in range(3):
        pool.add(f"expert-{place}", 1, 1)
    asked: list[FakeActor] = []
    all_are_asked = asyncio.Event()
    describe = pool.describe

    async def slow(actor: FakeActor, timeout_s: float, epoch: int = 0) -> ActorReport:
        asked.append(actor)
        if len(asked) == 3:
            all_are_asked.set()
        async with asyncio.timeout(timeout_s):
            await all_are_asked.wait()
        return await describe(actor, timeout_s, epoch)

    pool.describe = slow  # type: ignore[method-assign]
    async with running(3, pool):
        assert len(pool.actors) == 3
        assert all(actor.alive for actor in pool.actors)


@pytest.mark.parametrize(
    "changes",
    [{"digest": "another"}, {"actor_id": "expert-9"}, {"hung": True}],
    ids=["another configuration", "one too many", "hung"],
)
async def test_an_actor_that_does_not_fit_is_ended_and_not_adopted(changes: dict[str, Any]) -> None:
    pool = FakePool()
    old = pool.add("expert-0", 2, 5, **changes)
    cluster = await started(1, pool)
    placement = cluster.state.placement
    assert old.killed
    expected = 1 if "actor_id" in changes else 3
    assert placement.generations == {"expert-0": expected}
    # Even an actor that is ended tells which epochs are used up.
    assert placement.epoch == (1 if "hung" in changes else 6)


async def test_of_two_generations_the_newer_is_adopted_and_the_older_ended() -> None:
    pool = FakePool()
    newer, older = pool.add("expert-0", 3, 1), pool.add("expert-0", 2, 1)
    async with running(1, pool) as cluster:
        assert (await cluster.complete()).generations == {"expert-0": 3}
        assert (newer.killed, older.killed) == (False, True)


async def test_an_adopted_actor_is_compared_with_its_own_pool() -> None:
    cluster = Cluster(pools={"gpu": (1, 60), "cpu": (1, 20)})
    gpu = cluster.pool.add("gpu-0", 1, 1)
    cpu = cluster.pool.add("cpu-0", 1, 1)
    cpu.digest = cluster.specs["cpu-0"].digest
    assert gpu.digest == cluster.specs["gpu-0"].digest != cpu.digest
    await cluster.start()
    await cluster.complete()
    assert not gpu.killed
    assert not cpu.killed


async def test_a_next_controller_does_not_wait_for_a_lost_actor_to_place_the_others() -> None:
    pool = FakePool("n1", "n2", "n3")
    async with running(3, pool, min_copies=2) as first:
        await first.complete()
    kept = {actor.actor_id: list(actor.keys) for actor in pool.actors[1:]}
    pool.actors[0].alive = False
    gate = pool.hold_loads("expert-0")
    async with running(3, pool, min_copies=2) as second:
        served = await second.until(lambda p: p.epoch == 2 and not p.missing())
        assert "expert-0" not in served.generations
        assert {a: pool.of(a)[0].keys for a in kept} == kept
        gate.set()
        await second.until(lambda p: p.fewest_copies() == 2)


async def test_a_next_controller_that_wants_fewer_copies_has_the_others_let_go() -> None:
    pool = FakePool()
    async with running(3, pool, min_copies=2) as first:
        await first.complete()
    pids = {actor.actor_id: actor.pid for actor in pool.actors}
    async with running(3, pool, min_copies=1) as second:
        assert second.state.placement.fewest_copies() == 2
        after = await second.until(lambda p: set(map(len, p.holders.values())) == {1})
        await happens(lambda: sum(len(a.keys) for a in pool.actors) == 2 * NUM_EXPERTS)
        for actor in pool.actors:
            held = [k for k, actors in after.holders.items() if actor.actor_id in actors]
            assert sorted(held) == actor.keys
        assert {actor.actor_id: actor.pid for actor in pool.actors} == pids
        assert all(placement.missing() == [] for placement in second.published)
        assert len(pool.unloads) == len(set(dict(pool.unloads)))


async def test_no_copy_is_let_go_while_one_that_is_to_stay_is_not_there() -> None:
    pool = FakePool()
    async with running(2, pool, min_copies=2) as first:
        await first.complete()
    gate = asyncio.Event()

    async def slow(actor: FakeActor) -> None:
        if actor.generation > 1:
            await gate.wait()

    pool.load_gate = slow
    pool.of("expert-0")[0].alive = False
    async with running(2, pool, min_copies=1) as second:
        [kept] = pool.of("expert-1")
        await happens(lambda: kept.heartbeats > 5 and len(pool.of("expert-0")) == 2)
        assert pool.unloads == []
        assert second.state.placement.missing() == []
        gate.set()
        await second.until(lambda p: len(p.generations) == 2)
        await happens(lambda: len(kept.keys) == len(second.state.shares["expert-1"]))
        assert second.state.placement.missing() == []
