"""A controller after a redeploy with other weights: both models for a while, then the new alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.controller import controller
from cluster.controller.records import members
from cluster.controller.records.ledger import Ledger
from cluster.placement.placement import Placement
from cluster.placement.scaling import Wanted
from cluster.spec import ExpertKey, ModelExperts, model_id_of
from tests.unit.cluster.controller.fakes import (
    NUM_EXPERTS,
    TARGETS,
    Cluster,
    FakePool,
    busy,
    done,
    happens,
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


@asynccontextmanager
async def router_of(cluster: Cluster, model: str) -> AsyncIterator[list[Placement]]:
    """Watch as a router of a model does; yields the placements that it has got."""
    known: list[Placement] = []

    async def watch() -> None:
        while True:
            order = known[-1].order if known else (-1, -1)
            answer = await cluster.controller.watch(
                "router", hash(model), "n", order, 0.05, None, model
            )
            if answer["placement"] is not None:
                known.append(answer["placement"])

    task = asyncio.create_task(watch())
    try:
        yield known
    finally:
        task.cancel()
        await asyncio.wait([task])


def models_in(pool: FakePool) -> set[str]:
    return {key.model for actor in pool.actors if actor.alive for key in actor.keys}


async def served(pool: FakePool) -> None:
    """Deploy the old model whole, and end its controller."""
    async with running(2, pool, model=OLD) as cluster:
        await cluster.complete()


def complete(placement: Placement, model: str) -> bool:
    keys = [key for key in placement.holders if key.model == model]
    return bool(keys) and all(placement.holders[key] for key in keys)


async def test_old_experts_stay_for_the_old_routers_and_go_with_them() -> None:
    pool = FakePool()
    await served(pool)
    pids = {actor.pid for actor in pool.actors}
    async with running(2, pool, model=NEW) as cluster:
        async with router_of(cluster, OLD) as old:
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
    pool = FakePool()
    await served(pool)
    async with (
        running(2, pool, model=NEW, redeploy_drain_s=0.3) as cluster,
        router_of(cluster, OLD) as old,
    ):
        await cluster.until(lambda p: complete(p, NEW))
        assert complete(cluster.state.placement, OLD)
        await happens(lambda: models_in(pool) == {NEW})
        await happens(lambda: old[-1].models() == {NEW})


@pytest.mark.parametrize("short", ["budget", "free"])
async def test_without_memory_for_both_the_old_experts_go_before_the_new_ones_come(
    short: str,
) -> None:
    pool = FakePool()
    await served(pool)
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
    async with running(2, pool, model=NEW, **options) as cluster, router_of(cluster, OLD) as old:
        await cluster.until(lambda p: complete(p, NEW))
        assert models_in(pool) == {NEW}
        assert loads == [set(), set()]  # unloaded first
        await happens(lambda: bool(old) and old[-1].models() == {NEW})


async def test_memory_for_both_within_the_budget_is_used() -> None:
    pool = FakePool()
    await served(pool)
    pools = {"expert": (2, 10 * 2 * NUM_EXPERTS)}
    async with running(2, pool, model=NEW, pools=pools) as cluster, router_of(cluster, OLD):
        await cluster.until(lambda p: complete(p, NEW))
        assert models_in(pool) == {OLD, NEW}


async def test_an_old_model_that_loses_an_expert_ends_whole() -> None:
    pool = FakePool()
    await served(pool)
    async with running(2, pool, model=NEW) as cluster, router_of(cluster, OLD) as old:
        await cluster.until(lambda p: complete(p, NEW))
        pool.of("expert-0")[0].alive = False
        await happens(lambda: cluster.state.placement.models() == {NEW})
        await cluster.until(lambda p: complete(p, NEW))
        await happens(lambda: models_in(pool) == {NEW})
        assert not any(
            OLD in placement.models() and not complete(placement, OLD) for placement in old
        )


@pytest.mark.parametrize("lost", ["an actor", "the ledger"])
async def test_an_old_model_that_is_not_whole_at_the_start_is_not_kept(lost: str) -> None:
    pool = FakePool()
    await served(pool)
    if lost == "an actor":
        pool.of("expert-0")[0].alive = False
    else:
        pool.store.values.clear()
    async with running(2, pool, model=NEW) as cluster:
        assert cluster.state.placement.models() == {NEW}
        await cluster.until(lambda p: complete(p, NEW))
        await happens(lambda: models_in(pool) == {NEW})


async def test_a_second_redeploy_keeps_both_earlier_models_and_going_back_reloads_nothing() -> None:
    pool = FakePool()
    await served(pool)
    async with running(2, pool, model=NEW) as cluster, router_of(cluster, OLD):
        await cluster.until(lambda p: complete(p, NEW))
    async with (
        running(2, pool, model="m@third") as cluster,
        router_of(cluster, OLD),
        router_of(cluster, NEW),
    ):
        await cluster.until(lambda p: complete(p, "m@third"))
        assert models_in(pool) == {OLD, NEW, "m@third"}
    before = {actor.actor_id: list(actor.keys) for actor in pool.actors}
    async with running(2, pool, model=OLD) as cluster, router_of(cluster, OLD):
        await cluster.until(lambda p: complete(p, OLD))
        assert {a.actor_id: [k for k in a.keys if k.model == OLD] for a in pool.actors} == {
            actor_id: [k for k in keys if k.model == OLD] for actor_id, keys in before.items()
        }
        await happens(lambda: models_in(pool) == {OLD})


async def test_the_same_content_with_other_limits_reloads_nothing() -> None:
    pool = FakePool()
    await served(pool)
    before = [(actor.pid, list(actor.keys)) for actor in pool.actors]
    async with running(2, pool, model=OLD) as cluster:
        assert not cluster.state.placement.missing()
        await cluster.complete()
        assert [(actor.pid, list(actor.keys)) for actor in pool.actors] == before
        assert cluster.state.retained == {}


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


def test_a_ledger_remembers_the_models() -> None:
    models = (ModelExperts(OLD, (0, 2), 4, 10), ModelExperts("n", (1,), 2, 7))
    ledger = Ledger(3, {"a": 1}, {}, models)
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert Ledger.from_json('{"epoch": 1, "generations": {}}').models == ()


@pytest.mark.usefixtures("quick_scaling")
async def test_copies_for_the_load_leave_room_for_retained_experts() -> None:
    pool, budget = FakePool(), 10 * 2 * NUM_EXPERTS
    await served(pool)
    held: list[int] = []
    async with running(2, pool, model=NEW, pools={"expert": (2, budget)}) as cluster:
        async with router_of(cluster, OLD):
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
    pool = FakePool()
    await served(pool)
    async with running(2, pool, model=NEW) as cluster, router_of(cluster, OLD):
        await cluster.until(lambda p: complete(p, NEW))
        assert (await done(cluster.controller.drain("expert-1", False))).outcome == "committed"
        assert cluster.state.placement.models() == {NEW}
        assert not cluster.state.placement.missing()


@pytest.mark.usefixtures("quick_scaling")
async def test_no_pool_shrinks_by_itself_while_old_routers_need_its_actors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (controller, members):  # else a busy machine makes the old router silent
        monkeypatch.setattr(module, "MEMBER_TTL_S", 2.0)
    pool = FakePool()
    await served(pool)
    async with running(2, pool, model=NEW, autoscaling=TARGETS) as cluster:
        policy = cluster.controller._autoscaler._policies["expert"]
        wanted: list[Wanted] = []
        decide = policy.decide

        def noted(*args: Any) -> Wanted | None:
            decided = decide(*args)
            wanted.extend([decided] if decided is not None else [])
            return decided

        monkeypatch.setattr(policy, "decide", noted)
        async with router_of(cluster, OLD):
            await cluster.until(lambda p: complete(p, NEW))
            await happens(lambda: len(wanted) > 0)
            await asyncio.sleep(1.5)  # an actor ends in a third of it
            assert wanted[0].actors == 1
            assert cluster.state.placement.models() == {OLD, NEW}
        await happens(lambda: sum(actor.alive for actor in pool.actors) == 1)
        assert cluster.state.placement.models() == {NEW}


async def test_old_models_go_though_the_ledger_cannot_be_written() -> None:
    pool = FakePool()
    await served(pool)
    async with running(2, pool, model=NEW) as cluster, router_of(cluster, OLD):
        await cluster.until(lambda p: complete(p, NEW))
    third, failed = "m@third", asyncio.Event()

    def fail(key: str, value: bytes) -> bool:
        failed.set()
        raise ConnectionError("the store is away")

    async with running(2, pool, model=third) as cluster:
        async with router_of(cluster, NEW):
            async with router_of(cluster, OLD):
                await cluster.until(lambda p: complete(p, third))
            pool.store.create = fail  # type: ignore[method-assign]
            await happens(lambda: models_in(pool) == {NEW, third})
            await happens(failed.is_set)
            del pool.store.create
        await happens(lambda: models_in(pool) == {third})
        await happens(lambda: [m.model for m in pool.ledger().models] == [third])
