"""More and fewer actors over a fake pool: experts follow, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.controller.changes import elastic as elastic_module
from cluster.controller.controller import Controller
from cluster.errors import CheckpointError, InvalidRequestError, UnavailableError
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    NUM_EXPERTS,
    FakeActor,
    FakePool,
    autoscaled,
    away,
    busy,
    done,
    happens,
    never_lost,
    running,
    settled,
    sizes,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods", "quick_scaling")


async def test_experts_spread_over_new_actors_and_come_back_when_they_go() -> None:
    cluster = await started(2)
    since = len(cluster.published)
    grown = await done(cluster.controller.scale(4, "", False))
    assert (grown.outcome, grown.added) == ("committed", ("expert-2", "expert-3"))
    assert grown.what == "expert: 2 -> 4 actors"
    assert sizes(await settled(cluster, 1)) == {f"expert-{i}": 2 for i in range(4)}
    assert grown.moved_bytes == 40
    shrunk = await done(cluster.controller.scale(1, "expert", False))
    assert (shrunk.outcome, len(shrunk.removed)) == ("committed", 3)
    placement = await settled(cluster, 1)
    assert list(sizes(placement).values()) == [2 * NUM_EXPERTS]
    assert shrunk.moved_bytes == 60
    assert never_lost(cluster, since)
    gone = [actor for actor in cluster.pool.actors if actor.killed]
    assert {actor.actor_id for actor in gone} == set(shrunk.removed)
    assert all(not actor.keys for actor in gone)  # none was ended before it was empty
    again = await done(cluster.controller.scale(4, "", False))
    assert len(again.added) == 3
    assert sizes(await settled(cluster, 1)) == {f"expert-{i}": 2 for i in range(4)}
    # Ids are used again, generations never.
    assert sorted(cluster.state.placement.generations.values()) == [1, 2, 2, 2]
    load = await cluster.controller.load()
    assert load.changes == (again, shrunk, grown)


async def test_a_dry_run_tells_what_would_be_and_changes_nothing() -> None:
    cluster = await started(2)
    before = cluster.state.placement
    controller = cluster.controller
    up = await done(controller.scale(3, "", True))
    assert (up.outcome, up.added) == ("planned", ("expert-new-0",))
    assert "expert-new-0" in {move.actor_id for move in up.moves if move.is_added}
    down = await done(controller.scale(1, "", True))
    assert (down.outcome, down.removed, down.moved_bytes) == ("planned", ("expert-1",), 40)
    drained = await done(controller.drain("expert-0", True))
    assert (drained.outcome, drained.removed) == ("planned", ("expert-0",))
    copied = await done(controller.set_copies("m", 0, 0, 2, True))
    assert (copied.outcome, len(copied.moves)) == ("planned", 1)
    assert (await done(controller.scale(2, "", False))).outcome == "unchanged"
    assert cluster.state.placement == before
    assert len(cluster.pool.actors) == 2
    assert (await controller.load()).changes == ()


async def test_an_actor_leaves_though_the_ledger_cannot_be_written_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = await started(3)
    with away(cluster.pool.store, "create"):
        report = await done(cluster.controller.scale(2, "", False))
        assert (report.outcome, report.removed) == ("committed", ("expert-2",))
        assert "the ledger does not record that expert-2 left" in caplog.text
        assert cluster.pool.of("expert-2")[0].killed
        assert set(cluster.state.shares) == {"expert-0", "expert-1"}
        await done(cluster.controller.rebalance(False))
    await done(cluster.controller.scale(3, "", False))  # writes it
    assert cluster.pool.ledger().generations["expert-2"] == 2


Ask = Callable[[Controller], Awaitable[dict[str, Any]]]
REFUSED: dict[str, tuple[Ask, str]] = {
    "no actors": (lambda c: c.scale(0, "", False), "from 1 to 1000 actors (given: 0)"),
    "negative": (lambda c: c.scale(-1, "", False), "(given: -1)"),
    "too many": (lambda c: c.scale(1001, "", False), "(given: 1001)"),
    "other pool": (lambda c: c.scale(2, "gpu", False), "must be one of expert (given: 'gpu')"),
    "last actors": (lambda c: c.drain("node", False), "is neither an actor"),
    "unknown": (lambda c: c.drain("expert-9", False), "actors: expert-0, expert-1"),
    "no copy": (lambda c: c.set_copies("m", 0, 0, 0, False), "from 1 to 2 (given: 0)"),
    "copies": (lambda c: c.set_copies("m", 0, 0, 3, False), "from 1 to 2 (given: 3)"),
    "expert": (lambda c: c.set_copies("m", 0, 9, 1, False), "no model 'm' with expert 9"),
    "model": (lambda c: c.set_copies("x", 0, 0, 1, False), "no model 'x'"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_out_of_bounds_is_refused_and_changes_nothing(case: str) -> None:
    ask, words = REFUSED[case]
    cluster = await started(2)
    before = cluster.state.placement
    with pytest.raises(InvalidRequestError) as caught:
        await done(ask(cluster.controller))
    assert words in str(caught.value)
    assert cluster.state.placement == before


async def test_no_fewer_actors_than_copies_or_than_budgets_hold() -> None:
    async with running(3, min_copies=2) as cluster:
        await cluster.until(lambda p: p.fewest_copies() == 2)
        with pytest.raises(InvalidRequestError, match="from 2 to 1000"):
            await done(cluster.controller.scale(1, "", False))
        assert (await done(cluster.controller.scale(2, "", False))).outcome == "committed"
        assert cluster.state.placement.fewest_copies() == 2
    tight = await started(pools={"expert": (3, 40)})
    assert (await done(tight.controller.scale(2, "", False))).outcome == "committed"
    with pytest.raises(InvalidRequestError, match="refused"):
        await done(tight.controller.scale(1, "", False))
    assert len(tight.state.placement.generations) == 2


async def test_draining_takes_just_that_actor_or_those_of_that_node() -> None:
    pool = FakePool("aaaaaaaa", "aaaaaabb")
    cluster = await started(4, pool)
    since = len(cluster.published)
    report = await done(cluster.controller.drain("expert-0", False))
    assert (report.outcome, report.removed) == ("committed", ("expert-0",))
    with pytest.raises(InvalidRequestError):
        await done(cluster.controller.drain("aaaaaa", False))  # of two nodes
    planned = await done(cluster.controller.drain("aaaaaab", True))
    assert (planned.outcome, planned.removed) == ("planned", ("expert-1", "expert-3"))
    report = await done(cluster.controller.drain("aaaaaab", False))
    assert report.removed == ("expert-1", "expert-3")
    assert len(sizes(await settled(cluster, 1))) == 3  # two successors, on the node that stays
    assert {cluster.state.nodes[actor_id] for actor_id in cluster.state.shares} == {"aaaaaaaa"}
    assert never_lost(cluster, since)
    for dry_run in (True, False):
        with pytest.raises(InvalidRequestError, match="is the head"):
            await done(cluster.controller.drain("aaaaaaaa", dry_run))


async def test_an_actor_that_cannot_be_emptied_stays() -> None:
    cluster = await started(2)
    before = cluster.state.placement

    async def broken(actor: FakeActor) -> None:
        raise CheckpointError("gone", "file")

    cluster.pool.load_gate = broken
    report = await done(cluster.controller.scale(1, "", False))
    assert report.outcome.startswith("failed: ")
    assert "gone" in report.outcome
    assert (report.removed, report.moves) == ((), ())
    assert cluster.state.placement.holders == before.holders
    cluster.pool.load_gate = None
    assert (await done(cluster.controller.scale(1, "", False))).outcome == "committed"


async def test_an_actor_that_ray_has_no_device_for_is_told_and_used_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elastic_module, "UP_TIMEOUT_S", 0.1)
    cluster = await started(2)
    room = cluster.pool.hold_loads("expert-2")
    report = await done(cluster.controller.scale(3, "", False))
    assert report.outcome == "pending: expert-2: it needs GPU 1"
    # Meanwhile everything else goes on, and it is the first to go again.
    assert (await done(cluster.controller.set_copies("m", 0, 0, 2, False))).outcome == ("committed")
    assert (await done(cluster.controller.scale(2, "", False))).removed == ("expert-2",)
    [waiting] = cluster.pool.of("expert-2")
    assert waiting.killed
    assert (await done(cluster.controller.scale(3, "", False))).outcome[:7] == "pending"
    room.set()
    await happens(lambda: bool(cluster.state.shares["expert-2"]))
    assert sizes(await settled(cluster, 1))["expert-2"] > 0
    history = cluster.controller._elastic.history
    await happens(lambda: history[0].what == "expert-2 came up")
    assert history[0].outcome == "committed"


async def test_a_dead_actor_that_does_not_come_back_can_be_done_without() -> None:
    cluster = await started(3)
    cluster.pool.hold_loads("expert-1")
    cluster.pool.of("expert-1")[0].alive = False
    await cluster.until(lambda p: bool(p.missing()))
    with pytest.raises(UnavailableError, match="expert-1 is away"):
        await done(cluster.controller.drain("expert-0", False))
    report = await done(cluster.controller.drain("expert-1", False))
    assert report.outcome == "committed"
    assert sorted(sizes(await settled(cluster, 1))) == ["expert-0", "expert-2"]


async def test_actors_leave_a_node_that_ray_drains_and_successors_take_over() -> None:
    pool = FakePool("n0", "n1")
    cluster = await started(2, pool)
    since = len(cluster.published)
    assert pool.of("expert-1")[0].node == "n1"
    pool.node_ids, pool.draining_ids = ["n0", "n2"], {"n1"}
    placement = await cluster.until(lambda p: "expert-1" not in p.generations)
    await happens(lambda: pool.of("expert-1")[-1].killed)
    placement = await settled(cluster, 1)
    assert sizes(placement) == {"expert-0": 4, "expert-2": 4}
    assert never_lost(cluster, since)
    assert not pool.of("expert-0")[0].killed
    assert all(actor.node != "n1" for actor in pool.actors if actor.alive)
    [change] = (await cluster.controller.load()).changes
    assert (change.removed, change.reason) == (("expert-1",), "Ray drains it")


async def test_a_node_is_left_while_another_change_waits_for_a_device() -> None:
    pool = FakePool("n0", "n1")
    cluster = await started(2, pool)
    forever = pool.hold_loads("expert-2")
    growing = asyncio.create_task(done(cluster.controller.scale(3, "", False)))
    await happens(lambda: bool(pool.of("expert-2")))
    pool.draining_ids = {"n1"}
    pool.node_ids = ["n0"]
    await happens(lambda: pool.of("expert-1")[-1].killed)
    assert sizes(cluster.state.placement) == {"expert-0": 4, "expert-3": 4}
    forever.set()
    report = await growing
    assert (report.outcome, report.added) == ("committed", ("expert-2",))
    assert sizes(await settled(cluster, 1))["expert-2"] > 0


async def test_without_room_for_successors_those_who_stay_take_over() -> None:
    pool = FakePool("n0", "n1")
    cluster = await started(2, pool)
    forever = pool.hold_loads("expert-2")
    pool.draining_ids = {"n1"}
    await happens(lambda: pool.of("expert-1")[-1].killed)
    assert sizes(cluster.state.placement) == {"expert-0": 2 * NUM_EXPERTS}
    forever.set()  # when there is a place again, it is used
    await happens(lambda: bool(cluster.state.shares["expert-2"]))
    assert sizes(await settled(cluster, 1)) == {"expert-0": 4, "expert-2": 4}


async def test_actors_come_with_load_and_go_when_it_is_gone() -> None:
    cluster = await autoscaled()
    cluster.pool.work_s = 1.6  # in each second, however many share it
    await cluster.until(lambda p: len(p.generations) == 4)
    cluster.pool.work_s = 0.0
    history = cluster.controller._elastic.history
    await happens(lambda: bool(history and history[0].removed))
    await happens(lambda: len(cluster.state.placement.generations) == 1)
    assert never_lost(cluster, 2)
    changes = (await cluster.controller.load()).changes
    assert {change.outcome for change in changes} == {"committed"}
    assert "busy 0% (target 50%)" in changes[0].reason
    assert "for 0.2 s" in changes[0].reason
    assert "(target 50%)" in changes[-1].reason
    with pytest.raises(InvalidRequestError, match="from 1 to 4"):
        await done(cluster.controller.scale(5, "", False))


async def test_a_policy_that_only_tells_changes_nothing() -> None:
    cluster = await autoscaled(dry_run=True)
    cluster.pool.work_s = 1.6
    await happens(lambda: bool(cluster.controller._elastic.history))
    [change] = (await cluster.controller.load()).changes
    assert (change.outcome, change.what) == ("planned", "expert: 2 -> 4 actors")
    assert len(cluster.pool.actors) == 2


async def test_a_next_controller_keeps_the_actors_that_there_are() -> None:
    pool = FakePool()
    async with running(2, pool) as cluster:
        await cluster.complete()
        await done(cluster.controller.scale(3, "", False))
        before = await settled(cluster, 1)
    async with running(2, pool) as cluster:
        after = await cluster.complete()
        assert after.holders == before.holders
        assert after.generations == before.generations
        await done(cluster.controller.drain("expert-0", False))
        assert sorted(sizes(await settled(cluster, 1))) == ["expert-1", "expert-2"]
    # Another number in the configuration counts again; those who are there come first.
    cluster = await started(1, pool)
    assert sorted(sizes(await settled(cluster, 1))) == ["expert-1"]


async def test_rebalancing_goes_on_beside_an_actor_that_waits_for_its_device() -> None:
    cluster = await started(pools={"expert": (3, 60)})
    cluster.pool.hold_loads("expert-3")
    await busy(cluster, {ExpertKey("m", 0, 0): 100_000})
    growing = asyncio.create_task(cluster.controller.scale(4, "", False))
    await happens(lambda: bool(cluster.pool.of("expert-3")))
    told = await cluster.controller.rebalance(False)
    assert told["report"].outcome == "committed"
    growing.cancel()


async def test_pools_are_scaled_by_their_names() -> None:
    cluster = await started(pools={"gpu": (1, 60), "cpu": (2, 40)})
    with pytest.raises(InvalidRequestError, match="one of gpu, cpu"):
        await done(cluster.controller.scale(2, "", False))
    assert (await done(cluster.controller.scale(2, "gpu", False))).added == ("gpu-1",)
    report = await done(cluster.controller.scale(0, "cpu", False))
    assert sorted(report.removed) == ["cpu-0", "cpu-1"]
    assert sorted(sizes(await settled(cluster, 1))) == ["gpu-0", "gpu-1"]
