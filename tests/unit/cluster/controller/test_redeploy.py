"""A controller after a redeploy with other weights: both models for a while, then the new alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.controller import controller
from cluster.controller.records import members
from cluster.placement.placement import Placement
from cluster.placement.scaling import Wanted
from cluster.spec import ExpertKey, model_id_of
from tests.unit.cluster.controller.fakes import (
    NUM_EXPERTS,
    TARGETS,
    Cluster,
    FakePool,
    away,
    busy,
    done,
    happens,
    router_of,
    running,
    started,
)

OLD, NEW = "m@old", "m@new"
pytestmark = pytest.mark.usefixtures("short_periods")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "RETAIN_CHECK_S", 0.01)
    monkeypatch.setattr(controller, "MEMBER_TTL_S", 0.3)
    monkeypatch.setattr(members, "MEMBER_TTL_S", 0.3)


def models_in(pool: FakePool) -> set[str]:
    return {key.model for actor in pool.actors if actor.alive for key in actor.keys}


async def served() -> FakePool:
    """Deploy the old model whole, and end its controller."""
    async with running(2, pool := FakePool(), model=OLD) as cluster:
        await cluster.complete()
    return pool


@asynccontextmanager
async def redeployed(
    pool: FakePool, **options: Any
) -> AsyncIterator[tuple[Cluster, list[Placement]]]:
    """Have the new model follow the old, whose router has the placements; leave with the latter."""
    async with (
        running(2, pool, model=NEW, **options) as cluster,
        router_of(cluster, model=OLD) as old,
    ):
        await cluster.until(lambda p: complete(p, NEW))
        yield cluster, old


def complete(placement: Placement, model: str) -> bool:
    keys = [key for key in placement.holders if key.model == model]
    return bool(keys) and all(placement.holders[key] for key in keys)


async def test_old_experts_stay_for_the_old_routers_and_go_with_them() -> None:
    pool = await served()
    pids = {actor.pid for actor in pool.actors}
    async with running(2, pool, model=NEW) as cluster:
        async with router_of(cluster, model=OLD) as old:
            await cluster.until(lambda p: complete(p, NEW))
            assert models_in(pool) == {OLD, NEW}
            await asyncio.sleep(0.6)  # twice as long as a silent router counts
            assert models_in(pool) == {OLD, NEW}
            assert all(complete(placement, OLD) for placement in old)
            assert cluster.controller._status().missing_experts == 0
            assert cluster.controller._status().models == ("m",)
            held = [e for a in cluster.controller._status().actors for e in a.experts]
            assert len(held) == 2 * NUM_EXPERTS  # the new model's alone
        await happens(lambda: models_in(pool) == {NEW})
        assert cluster.state.placement.models() == {NEW}
        assert {actor.pid for actor in pool.actors if actor.alive} == pids
        assert cluster.state.retained == {}
        await happens(lambda: [m.model for m in pool.ledger().models] == [NEW])


async def test_at_the_end_of_its_drain_time_an_old_model_goes_though_routers_serve_it() -> None:
    pool = await served()
    async with redeployed(pool, redeploy_drain_s=0.3) as (cluster, old):
        assert complete(cluster.state.placement, OLD)
        await happens(lambda: models_in(pool) == {NEW})
        await happens(lambda: old[-1].models() == {NEW})


@pytest.mark.parametrize("short", ["budget", "free"])
async def test_without_memory_for_both_the_old_experts_go_before_the_new_ones_come(
    short: str,
) -> None:
    pool = await served()
    options: dict[str, Any] = {}
    if short == "budget":
        options["pools"] = {"expert": (2, 10 * 2 * NUM_EXPERTS - 10)}
    else:
        for actor in pool.actors:
            actor.free_bytes = 30
    loads: list[set[str]] = []

    async def note(actor: Any) -> None:
        loads.append({key.model for key in actor.keys})

    pool.load_gate = note
    async with redeployed(pool, **options) as (_, old):
        assert models_in(pool) == {NEW}
        assert loads == [set(), set()]  # unloaded first
        await happens(lambda: bool(old) and old[-1].models() == {NEW})


async def test_an_old_model_that_loses_an_expert_ends_whole() -> None:
    pool = await served()
    async with redeployed(pool) as (cluster, old):
        pool.of("expert-0")[0].alive = False
        await happens(lambda: cluster.state.placement.models() == {NEW})
        await cluster.until(lambda p: complete(p, NEW))
        await happens(lambda: models_in(pool) == {NEW})
        assert not any(
            OLD in placement.models() and not complete(placement, OLD) for placement in old
        )


@pytest.mark.parametrize("lost", ["an actor", "the ledger"])
async def test_an_old_model_that_is_not_whole_at_the_start_is_not_kept(lost: str) -> None:
    pool = await served()
    if lost == "an actor":
        pool.of("expert-0")[0].alive = False
    else:
        pool.store.values.clear()
    async with running(2, pool, model=NEW) as cluster:
        assert cluster.state.placement.models() == {NEW}
        await cluster.until(lambda p: complete(p, NEW))
        await happens(lambda: models_in(pool) == {NEW})


async def test_a_second_redeploy_keeps_both_earlier_models_and_going_back_reloads_nothing() -> None:
    pool = await served()
    async with redeployed(pool):
        pass
    async with (
        running(2, pool, model="m@third") as cluster,
        router_of(cluster, model=OLD),
        router_of(cluster, model=NEW),
    ):
        await cluster.until(lambda p: complete(p, "m@third"))
        assert models_in(pool) == {OLD, NEW, "m@third"}
    before = {actor.actor_id: list(actor.keys) for actor in pool.actors}
    async with running(2, pool, model=OLD) as cluster, router_of(cluster, model=OLD):
        await cluster.until(lambda p: complete(p, OLD))
        assert {a.actor_id: [k for k in a.keys if k.model == OLD] for a in pool.actors} == {
            actor_id: [k for k in keys if k.model == OLD] for actor_id, keys in before.items()
        }
        await happens(lambda: models_in(pool) == {OLD})


async def test_an_operator_names_the_model_by_its_id() -> None:
    pool = FakePool()
    cluster = await started(2, pool, model=NEW)
    outcome = await cluster.controller.set_copies(model_id_of(NEW), 0, 1, 2, False)
    assert outcome["report"].outcome == "committed"
    assert {move.model for move in outcome["report"].moves} == {"m"}
    assert len(cluster.state.placement.holders[ExpertKey(NEW, 0, 1)]) == 2
    load = await cluster.controller.load()
    assert {expert.model for expert in load.experts} == {"m"}
    assert {move.model for change in load.changes for move in change.moves} == {"m"}
    unknown = await cluster.controller.set_copies("other", 0, 1, 2, False)
    assert "no model 'other'" in unknown["error"]["message"]


@pytest.mark.usefixtures("quick_scaling")
async def test_copies_for_the_load_leave_room_for_retained_experts() -> None:
    pool, budget = await served(), 10 * 2 * NUM_EXPERTS
    held: list[int] = []
    async with running(2, pool, model=NEW, pools={"expert": (2, budget)}) as cluster:
        async with router_of(cluster, model=OLD):
            await cluster.until(lambda p: complete(p, NEW))
            await busy(cluster, {ExpertKey(NEW, 0, 0): 100_000, ExpertKey(NEW, 1, 0): 90_000})
            await cluster.controller.rebalance(False)
            held += [10 * len(actor.keys) for actor in pool.actors]
            assert models_in(pool) == {OLD, NEW}
        await happens(lambda: models_in(pool) == {NEW})
        await busy(cluster, {ExpertKey(NEW, 0, 0): 100_000, ExpertKey(NEW, 1, 0): 90_000})
        moved = await done(cluster.controller.rebalance(False))
        assert any(move.is_added for move in moved.moves)  # there is room now
    assert max(held) <= budget


@pytest.mark.usefixtures("quick_scaling")
async def test_an_operator_drains_an_actor_whatever_old_routers_need() -> None:
    pool = await served()
    async with redeployed(pool) as (cluster, _):
        assert (await done(cluster.controller.drain("expert-1", False))).outcome == "committed"
        assert cluster.state.placement.models() == {NEW}
        assert not cluster.state.placement.missing()


@pytest.mark.usefixtures("quick_scaling")
async def test_no_pool_shrinks_by_itself_while_old_routers_need_its_actors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = await served()
    async with running(2, pool, model=NEW, autoscaling=TARGETS) as cluster:
        policy = cluster.controller._autoscaler._policies["expert"]
        decided: list[Wanted | None] = []
        decide = policy.decide
        monkeypatch.setattr(
            policy, "decide", lambda *args: decided.append(decide(*args)) or decided[-1]
        )
        async with router_of(cluster, model=OLD):
            await cluster.until(lambda p: complete(p, NEW))
            await happens(lambda: any(decided))
            await asyncio.sleep(1.5)  # an actor ends in a third of it
            assert next(one.actors for one in decided if one) == 1
            assert cluster.state.placement.models() == {OLD, NEW}
        await happens(lambda: sum(actor.alive for actor in pool.actors) == 1)
        assert cluster.state.placement.models() == {NEW}


async def test_old_models_go_though_the_ledger_cannot_be_written() -> None:
    pool = await served()
    async with redeployed(pool):
        pass
    third = "m@third"
    async with running(2, pool, model=third) as cluster:
        async with router_of(cluster, model=NEW):
            async with router_of(cluster, model=OLD):
                await cluster.until(lambda p: complete(p, third))
            with away(pool.store, "create") as asked:
                await happens(lambda: models_in(pool) == {NEW, third})
                await happens(lambda: bool(asked))
        await happens(lambda: models_in(pool) == {third})
        await happens(lambda: [m.model for m in pool.ledger().models] == [third])
