"""Controllers that are cut off, or of which there are two, over a fake pool of actors."""

from __future__ import annotations

import asyncio

import pytest

from cluster.controller.health import liveness, suspicion
from cluster.controller.records import adopt as adopt_module
from cluster.controller.records.ledger import LedgerStore
from cluster.errors import StaleEpochError
from cluster.reports import Heard
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    LIMIT_S,
    Cluster,
    FakeActor,
    FakePool,
    away,
    beats,
    happens,
    router_of,
    running,
    spec_of,
    started,
    tasks_of,
)

pytestmark = pytest.mark.usefixtures("short_periods")


def hang(cluster: Cluster, *actor_ids: str) -> list[FakeActor]:
    """Have actors answer the controller no more."""
    actors = [actor for actor in cluster.pool.actors if actor.actor_id in actor_ids]
    for actor in actors:
        actor.hung = True
    return actors


async def silences(cluster: Cluster, *words: str) -> None:
    """Wait until the status says of as many actors as there are words why they are kept."""

    def are_noted() -> bool:
        notes = cluster.keeper.suspicion.notes().values()
        return len(notes) == len(words) and all(map(str.endswith, sorted(notes), sorted(words)))

    await happens(are_noted)


async def test_a_controller_that_hears_no_actor_any_more_kills_none_of_them() -> None:
    cluster = await started(4)
    before = cluster.state.placement
    actors = hang(cluster, *(f"expert-{i}" for i in range(4)))
    await silences(cluster, *["cut off"] * 4)
    await asyncio.sleep(3 * liveness.SILENT_S)
    status = await cluster.controller.status()
    assert all("the controller itself may be cut off" in a.silence for a in status.actors)
    assert not any(actor.killed for actor in actors)
    for actor in actors:
        actor.hung = False
    await happens(lambda: not cluster.keeper.suspicion.notes())
    assert not any(actor.killed for actor in actors)
    assert cluster.state.placement.order == before.order
    assert [a.silence for a in (await cluster.controller.status()).actors] == [""] * 4


async def test_an_actor_that_routers_hear_is_kept_until_they_do_not() -> None:
    cluster = await started(4)
    heard: dict[str, Heard] = {"expert-1": (1, 0.0), "expert-0": (7, 0.0)}
    async with router_of(cluster, lambda: heard):
        gone, kept = hang(cluster, "expert-0", "expert-1")[:2]
        # Of expert-0 the router has heard another generation, which says nothing.
        await cluster.controller.suspect("expert-0", 1, True)
        await happens(lambda: gone.killed)
        await silences(cluster, "routers hear it")
        await asyncio.sleep(3 * liveness.SILENT_S)
        assert not kept.killed
        assert cluster.state.placement.generations["expert-1"] == 1
        heard.clear()
        await happens(lambda: kept.killed)


async def test_routers_are_asked_before_an_actor_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A router's call may be a long poll away, and the router hears the actor all the time."""
    monkeypatch.setattr(suspicion, "ANSWER_S", LIMIT_S)
    cluster = await started(4)
    placement = cluster.state.placement
    watch = cluster.controller.watch
    poll = asyncio.create_task(watch("router", 1, "n", placement.order, 60.0))
    gateway = asyncio.create_task(watch("gateway", 2, "n", placement.order, 60.0))
    await asyncio.sleep(0)
    [actor] = hang(cluster, "expert-0")
    answer = await asyncio.wait_for(poll, LIMIT_S)
    assert answer["placement"] is None
    await asyncio.sleep(2 * liveness.SILENT_S)
    assert not actor.killed  # the router has not said whom it hears
    await watch("router", 1, "n", placement.order, 0, heard={"expert-0": (1, 0.0)})
    await silences(cluster, "routers hear it")
    assert not actor.killed
    gateway.cancel()
    # The router says nothing any more, and is waited for no longer than its time.
    monkeypatch.setattr(suspicion, "ANSWER_S", 0.2)
    await happens(lambda: actor.killed)


async def test_of_two_silent_actors_with_last_copies_one_stays_until_the_other_is_back() -> None:
    cluster = await started(5, min_copies=2)
    placement = cluster.state.placement
    key, holders = next(iter(placement.holders.items()))
    silent = hang(cluster, *holders)
    gate = cluster.pool.hold_loads()
    for actor in silent:
        await cluster.controller.suspect(actor.actor_id, 1, True)
    await happens(lambda: any(actor.killed for actor in silent))
    first, second = sorted(silent, key=lambda actor: not actor.killed)
    await silences(cluster, "another actor loads")
    assert not second.killed
    assert cluster.state.placement.holders[key] == (second.actor_id,)
    cluster.pool.load_gate = None
    gate.set()
    await happens(lambda: second.killed)
    assert first.actor_id in cluster.state.placement.holders[key]
    assert all(published.holders[key] for published in cluster.published)


async def test_nobody_is_killed_while_the_ledger_cannot_be_read() -> None:
    cluster = await started(4)
    with away(cluster.pool.store, "keys"):
        [actor] = hang(cluster, "expert-0")
        await silences(cluster, "cannot be read")
        await asyncio.sleep(2 * liveness.SILENT_S)
        assert not actor.killed
    await happens(lambda: actor.killed)


# Two controllers.


@pytest.mark.parametrize("trouble", ["hangs", "is dead"])
async def test_an_older_controller_kills_and_creates_nobody_though_no_actor_has_met_the_newer(
    trouble: str,
) -> None:
    cluster = await started(4)
    LedgerStore("app", cluster.pool.store).claim()
    if trouble == "hangs":
        hang(cluster, "expert-0")
    else:
        cluster.pool.of("expert-0")[0].alive = False
    await cluster.superseded()
    assert cluster.state.is_superseded
    assert not any(actor.killed for actor in cluster.pool.actors)
    assert len(cluster.pool.actors) == 4
    assert cluster.pool.ledger().epoch == 2
    assert set(cluster.pool.ledger().generations.values()) == {1}


async def test_of_two_controllers_that_start_together_one_goes_on() -> None:
    pool = FakePool()
    async with running(3, pool) as cluster:
        await cluster.complete()
    both = [Cluster(3, pool), Cluster(3, pool)]
    await asyncio.gather(*(one.start() for one in both), return_exceptions=True)
    await happens(lambda: sum(one.state.is_superseded for one in both) == 1)
    [winner] = [one for one in both if not one.state.is_superseded]
    [loser] = [one for one in both if one.state.is_superseded]
    placement = await winner.complete()
    # The one that claimed second may have begun by then, and the first claims once more.
    assert placement.epoch == pool.ledger().epoch in (3, 4)
    assert loser.state.placement.epoch < placement.epoch
    await happens(lambda: all(task.done() for task in tasks_of(loser.controller)))
    assert not any(actor.killed for actor in pool.actors)


async def test_a_controller_whose_application_is_deleted_leaves_a_newer_ones_actors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.controller.controller.app_is_wanted", lambda app: False)
    cluster = await started(2)
    LedgerStore("app", cluster.pool.store).claim()
    await cluster.controller.close()
    assert all(actor.alive for actor in cluster.pool.actors)
    assert cluster.pool.ledger().generations == {"expert-0": 1, "expert-1": 1}


# Adoption.


async def test_an_actor_that_is_silent_at_the_adoption_is_adopted_once_it_answers() -> None:
    pool = FakePool()
    async with running(4, pool) as first:
        before = await first.complete()
    [silent] = pool.of("expert-0")
    answer, answers = silent.answer, asyncio.Event()

    async def late(epoch: int | None, timeout_s: float | None) -> object:
        await asyncio.wait_for(answers.wait(), timeout_s)
        return await answer(epoch, timeout_s)

    silent.answer = late  # type: ignore[method-assign]
    heard: dict[str, Heard] = {"expert-0": (1, 0.0)}
    async with running(4, pool) as second:
        watch = second.controller.watch
        # A router of the earlier epoch is told of no lost expert: it is asked first.
        told = await watch("router", 1, "n", before.order, 0, heard=heard)
        assert (told["placement"], told["asks_own"]) == (None, True)
        told = await watch("router", 1, "n", before.order, 0, heard=heard, own=before)
        assert told["asks_own"] is False
        after = told["placement"]
        assert after.missing() == []
        assert after.generations == before.generations
        assert {k: set(a) for k, a in after.holders.items()} == {
            k: set(a) for k, a in before.holders.items()
        }
        async with router_of(second, lambda: heard):
            await silences(second, "routers hear it")
            await asyncio.sleep(2 * liveness.SILENT_S)
            assert not silent.killed
            answers.set()
            await happens(lambda: silent.epoch == 2)
        assert pool.of("expert-0") == [silent]
        assert all(not placement.missing() for placement in second.published)


async def test_a_silent_actor_of_another_configuration_is_ended_when_it_answers() -> None:
    pool = FakePool()
    old = pool.add("expert-0", 2, 5, digest="another")
    answer = old.answer

    async def late(epoch: int | None, timeout_s: float | None) -> object:
        if epoch is None:
            raise TimeoutError
        return await answer(epoch, timeout_s)

    old.answer = late  # type: ignore[method-assign]
    # Its epoch is not known, and refuses this controller; the next one is newer.
    old.epoch = 0
    async with running(1, pool) as cluster:
        assert (await cluster.complete()).generations == {"expert-0": 3}
        assert old.killed


async def test_the_adoption_ends_nobody_once_a_newer_controller_runs() -> None:
    pool = FakePool()
    unfit = pool.add("expert-0", 2, 5, digest="another")

    async def refused() -> None:
        raise StaleEpochError("a newer controller has claimed the ledger", "epoch")

    with pytest.raises(StaleEpochError):
        await adopt_module.adopt(pool, {"expert-0": spec_of()}, 6, 0.1, refused)  # type: ignore[arg-type]
    assert not unfit.killed


# What actors report, and the placement.


async def test_what_an_actor_lacks_leaves_the_placement_at_once_and_is_loaded_again() -> None:
    cluster = await started(2)
    before = cluster.state.placement
    [actor] = cluster.pool.of("expert-0")
    gate = cluster.pool.hold_loads()
    lost = actor.keys.pop()
    corrected = await cluster.until(lambda p: p.order > before.order)
    assert corrected.missing() == [lost]
    assert corrected.generations == before.generations
    gate.set()
    after = await cluster.complete()
    assert lost in actor.keys
    assert after.holders == before.holders
    assert actor.alive


async def test_what_an_actor_holds_beyond_the_placement_is_unloaded() -> None:
    cluster = await started(2)
    placement = cluster.state.placement
    [actor] = cluster.pool.of("expert-0")
    beyond = next(k for k, actors in placement.holders.items() if actors == ("expert-1",))
    actor.keys.append(beyond)
    await happens(lambda: beyond not in actor.keys)
    assert cluster.state.placement.holders == placement.holders
    assert cluster.pool.unloads == [("expert-0", [beyond])]


async def test_a_report_from_before_a_change_corrects_nothing() -> None:
    cluster = await started(2)
    before = cluster.state.placement
    [actor] = cluster.pool.of("expert-0")
    heartbeat = cluster.pool.heartbeat
    asked, answered = asyncio.Event(), asyncio.Event()

    async def late(asked_actor: FakeActor, epoch: int) -> object:
        report = await heartbeat(asked_actor, epoch)
        if asked_actor is actor and not asked.is_set():
            asked.set()
            await answered.wait()
        return report

    cluster.pool.heartbeat = late  # type: ignore[method-assign, assignment]
    await asked.wait()
    key = ExpertKey("m", 0, next(k.expert_id for k in before.holders if k not in actor.keys))
    actor.keys.append(key)
    cluster.state.shares["expert-0"].append(key)
    await cluster.state.publish(
        lambda now: now.with_actor("expert-0", 1, cluster.state.shares["expert-0"])
    )
    changed = cluster.state.placement
    answered.set()
    await beats(actor, 2)
    assert cluster.state.placement is changed
