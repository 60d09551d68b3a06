"""Changes of who holds what, over a fake pool: all or nothing, one at a time, nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.controller.records import changes as changes_module
from cluster.controller.records import members
from cluster.errors import CheckpointError, UnavailableError
from cluster.placement.change import Change
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    Cluster,
    FakeActor,
    FakePool,
    beats,
    happens,
    running,
    settled,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")

KEY = ExpertKey("m", 0, 0)


def moving(cluster: Cluster) -> tuple[Change, str, str]:
    """Return a change that moves KEY, from whom, and to whom."""
    shares = cluster.state.shares
    source = next(actor_id for actor_id, keys in shares.items() if KEY in keys)
    target = next(actor_id for actor_id, keys in shares.items() if KEY not in keys)
    return Change({target: [KEY]}, {source: [KEY]}), source, target


async def test_a_copy_moves_in_one_version_and_is_let_go_afterwards() -> None:
    cluster = await started(3)
    before = cluster.state.placement
    change, source, target = moving(cluster)
    published = len(cluster.published)
    await cluster.changes.apply(change)
    told = (await cluster.controller.status()).actors
    assert {actor.actor_id for actor in told if KEY in actor.experts} == {target}
    assert len(cluster.published) == published + 1
    after = cluster.published[-1]
    assert after.holders == {**before.holders, KEY: (target,)}
    assert KEY in cluster.pool.of(target)[0].keys
    assert KEY not in cluster.pool.of(source)[0].keys
    assert await settled(cluster, 1) == after


@pytest.mark.parametrize("other", ["asks again", "is silent"])
async def test_what_is_dropped_stays_until_every_router_knows_it_or_is_silent_for_long(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    cluster = await started(3)
    before = cluster.state.placement.order
    for pid in (1, 2):
        await cluster.controller.watch("router", pid, "n", before, 0)
    change, source, _ = moving(cluster)
    applied = asyncio.create_task(cluster.changes.apply(change))
    await happens(lambda: cluster.state.placement.order > before)
    now, [holder] = cluster.state.placement.order, cluster.pool.of(source)
    await cluster.controller.watch("router", 1, "n", now, 0)
    await cluster.controller.watch("gateway", 3, "n", now, 0)
    await beats(holder)
    assert KEY in holder.keys
    assert not applied.done()
    if other == "asks again":
        await cluster.controller.watch("router", 2, "n", now, 0)
    else:
        monkeypatch.setattr(members, "MEMBER_TTL_S", 0)
    await applied
    assert KEY not in holder.keys


async def test_a_change_that_waits_too_long_for_routers_returns_and_lets_go_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changes_module, "RETIRE_TIMEOUT_S", 0.01)
    async with running(3) as cluster:
        await cluster.controller.watch("router", 1, "n", (await cluster.complete()).order, 0)
        change, source, _ = moving(cluster)
        await cluster.changes.apply(change)
        assert KEY in cluster.pool.of(source)[0].keys
        now = cluster.state.placement.order
        await cluster.controller.watch("router", 1, "n", now, 0)
        await settled(cluster, 1)


async def test_what_would_lose_an_expert_or_its_copies_is_refused() -> None:
    cluster = await started(3, min_copies=2)
    before = cluster.state.placement
    shares = {a: list(keys) for a, keys in cluster.state.shares.items()}
    first, second = before.holders[KEY]
    for dropped, message in (
        ({first: [KEY]}, "1 copies"),
        ({first: [KEY], second: [KEY]}, "0"),
    ):
        with pytest.raises(UnavailableError, match=f"refused: .* would have {message}"):
            await cluster.changes.apply(Change({}, dropped))
    cluster.state.shares["expert-9"] = []
    with pytest.raises(UnavailableError, match="expert-9 is not running"):
        await cluster.changes.apply(Change({"expert-9": [KEY]}, {}))
    del cluster.state.shares["expert-9"]
    assert cluster.state.shares == shares
    assert cluster.state.placement == before


async def test_a_drop_is_refused_while_the_other_copy_is_dead() -> None:
    cluster = await started(3)
    change, source, target = moving(cluster)
    await cluster.changes.apply(Change(change.added, {}))
    gate = cluster.pool.hold_loads()
    cluster.pool.of(target)[0].alive = False
    await cluster.until(lambda p: target not in p.generations)
    with pytest.raises(UnavailableError, match="would have no live copy"):
        await cluster.changes.apply(Change({}, {source: [KEY]}))
    assert KEY in cluster.pool.of(source)[0].keys
    gate.set()
    await settled(cluster, 1)


async def test_a_drop_is_refused_where_the_other_copy_dies_while_the_change_is_prepared() -> None:
    cluster = await started(4, min_copies=2)
    before = cluster.state.placement
    first, second = before.holders[KEY]
    third, fourth = (a for a in before.generations if a not in (first, second))
    await cluster.changes.apply(Change({third: [KEY]}, {}))
    other = next(k for k, held in before.holders.items() if k != KEY and fourth not in held)
    gates = {fourth: asyncio.Event(), second: asyncio.Event()}
    cluster.pool.load_gate = lambda actor: gates[actor.actor_id].wait()
    applied = asyncio.create_task(cluster.changes.apply(Change({fourth: [other]}, {first: [KEY]})))
    cluster.pool.of(second)[0].alive = False
    await cluster.until(lambda p: second not in p.generations)
    gates[fourth].set()
    with pytest.raises(UnavailableError, match="would have 1 live copy of 2"):
        await applied
    assert first in cluster.state.placement.holders[KEY]
    gates[second].set()
    await cluster.complete()


async def test_changes_at_the_same_time_are_made_one_after_the_other() -> None:
    cluster = await started(3)
    loading: list[str] = []
    most = 0

    async def gate(actor: FakeActor) -> None:
        nonlocal most
        loading.append(actor.actor_id)
        most = max(most, len(loading))
        await asyncio.sleep(0)
        loading.remove(actor.actor_id)

    cluster.pool.load_gate = gate
    shares = cluster.state.shares
    changes = [
        Change({target: [key]}, {source: [key]})
        for source, keys in shares.items()
        for key, target in zip(keys, [a for a in shares if a != source], strict=False)
    ]
    await asyncio.gather(*(cluster.changes.apply(one) for one in changes))
    assert most == 1
    placement = await settled(cluster, 1)
    assert all(len(actors) == 1 for actors in placement.holders.values())
    assert all(one.missing() == [] for one in cluster.published[3:])


@pytest.mark.parametrize(
    "failure", [CheckpointError("gone", "file"), TimeoutError(), OSError(), ValueError()]
)
async def test_a_copy_that_cannot_be_loaded_changes_nothing(failure: Exception) -> None:
    cluster = await started(3, min_copies=2)
    before = cluster.state.placement
    targets = [a for a in before.generations if a not in before.holders[KEY]]
    other = ExpertKey("m", 1, 0)
    more = next(a for a in before.generations if a not in before.holders[other])

    async def fail(actor: FakeActor) -> None:
        if actor.actor_id == targets[0]:
            raise failure

    cluster.pool.load_gate = fail
    source = before.holders[KEY][0]
    change = Change({targets[0]: [KEY], more: [other]}, {source: [KEY]})
    with pytest.raises(UnavailableError, match=f"{targets[0]} did not load"):
        await cluster.changes.apply(change)
    assert await settled(cluster, 2) == before


STEPS = ("before loading", "loaded", "committed", "unloading")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["target dies", "source dies", "controller dies"])
async def test_a_fault_between_any_two_steps_loses_no_expert(step: str, fault: str) -> None:
    pool = FakePool()
    async with running(3, pool, min_copies=2) as cluster:
        before = await cluster.complete()
        source = before.holders[KEY][0]
        target = next(a for a in before.generations if a not in before.holders[KEY])
        struck = asyncio.Event()

        async def strike() -> None:
            if struck.is_set():
                return
            struck.set()
            if fault == "controller dies":
                await cluster.stop()
                applied.cancel()
                await asyncio.sleep(0)
            else:
                pool.of(target if fault == "target dies" else source)[-1].alive = False

        at(step, cluster, strike, target)
        change = Change({target: [KEY]}, {source: [KEY]})
        applied = asyncio.create_task(cluster.changes.apply(change))
        [outcome] = await asyncio.gather(applied, return_exceptions=True)
        assert struck.is_set()
        assert outcome is None or isinstance(outcome, UnavailableError | asyncio.CancelledError), (
            outcome
        )
        start = next(i for i, p in enumerate(cluster.published) if p.fewest_copies() == 2)
        assert all(one.missing() == [] for one in cluster.published[start:])
        if fault != "controller dies":
            await settled(cluster, 2)
            return
    pool.load_gate = None
    async with running(3, pool, min_copies=2) as successor:
        assert successor.state.placement.missing() == []
        await settled(successor, 2)
        assert all(one.missing() == [] for one in successor.published)


def at(step: str, cluster: Cluster, strike: Callable[[], object], target: str) -> None:
    """Have ``strike`` awaited at a step of the next change."""
    pool, publish = cluster.pool, cluster.state.publish
    load, unload = pool.load, pool.unload

    async def striking_load(actor, *args):  # type: ignore[no-untyped-def]
        if step == "before loading":
            await strike()  # type: ignore[misc]
        report = await load(actor, *args)
        if step == "loaded":
            await strike()  # type: ignore[misc]
        return report

    async def striking_unload(actor, *args):  # type: ignore[no-untyped-def]
        if step == "unloading":
            await strike()  # type: ignore[misc]
        return await unload(actor, *args)

    async def striking_publish(change):  # type: ignore[no-untyped-def]
        await publish(change)
        if step == "committed" and target in cluster.state.placement.holders[KEY]:
            await strike()  # type: ignore[misc]

    pool.load, pool.unload = striking_load, striking_unload  # type: ignore[method-assign]
    cluster.state.publish = striking_publish  # type: ignore[method-assign]
