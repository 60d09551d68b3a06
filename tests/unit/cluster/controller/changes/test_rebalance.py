"""Rebalancing over a fake pool: from reported counters to copies that follow the load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.controller.changes import rebalance as rebalance_module
from cluster.errors import UnavailableError
from cluster.placement.balance import Plan, plan_copies
from cluster.placement.change import Change, batches
from cluster.placement.load import FALL_S
from cluster.reports import RebalanceReport
from cluster.spec import ExpertKey
from tests.unit.cluster.controller.fakes import (
    Cluster,
    busy,
    happens,
    restart,
    settled,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")


def key(layer_id: int, expert_id: int) -> ExpertKey:
    return ExpertKey("m", layer_id, expert_id)


async def report_of(cluster: Cluster, dry_run: bool = False) -> RebalanceReport:
    report: RebalanceReport = (await cluster.controller.rebalance(dry_run))["report"]
    return report


async def test_a_hot_expert_gets_copies_where_budgets_have_room() -> None:
    cluster = await started(pools={"expert": (4, 50)})
    hot = key(1, 2)
    await busy(cluster, {hot: 100_000, key(0, 0): 10, key(0, 1): 10})
    dry = await report_of(cluster, dry_run=True)
    assert (dry.outcome, len(cluster.published)) == ("planned", 4)
    report = await report_of(cluster)
    assert report.outcome == "committed"
    assert report.moves == dry.moves
    assert report.layers_after == pytest.approx(dry.layers_after, rel=1e-3)
    assert report.layers_after < report.layers_before
    placement = await settled(cluster, 1)
    assert len(placement.holders[hot]) > 1
    assert report.moved_bytes == 10 * sum(move.is_added for move in report.moves)
    assert max(len(actor.keys) for actor in cluster.pool.actors) <= 5
    assert (report.epoch, report.version) == placement.order
    load = await cluster.controller.load()
    assert load.rebalances == (report,)
    assert {e.actors for e in load.experts if (e.layer, e.expert) == (1, 2)} == {
        placement.holders[hot]
    }


async def test_without_budgets_experts_move_and_none_gets_more_copies() -> None:
    cluster = await started(2)
    before = cluster.state.placement
    [one, other] = [k for k, actors in before.holders.items() if actors == ("expert-0",)][:2]
    await busy(cluster, {one: 10_000, other: 10_000})
    report = await report_of(cluster)
    assert report.outcome == "committed"
    after = await settled(cluster, 1)
    assert {len(actors) for actors in after.holders.values()} == {1}
    assert report.devices_after < report.devices_before
    assert {len(actor.keys) for actor in cluster.pool.actors} <= {3, 4, 5}


async def test_copies_follow_the_load_by_themselves_when_that_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rebalance_module, "WORTH_GAIN", 0.5)
    plans: list[Plan] = []

    def planned(*args: Any) -> Plan:
        plans.append(plan_copies(*args))
        return plans[-1]

    monkeypatch.setattr(rebalance_module, "plan_copies", planned)
    caplog.set_level("INFO", "expertmesh")
    cluster = await started(pools={"expert": (4, 50)}, rebalance_period_s=0.01)
    placement = cluster.state.placement
    rates = dict.fromkeys(placement.holders, 1000)
    await busy(cluster, {**rates, key(0, 0): 1100})  # less than it is worth
    asked = len(plans)
    await happens(lambda: len(plans) > asked + 2)
    assert any(plan.added for plan in plans[asked:])
    assert cluster.state.placement == placement
    await busy(cluster, {**rates, key(0, 0): 100_000})
    after = await cluster.until(lambda p: len(p.holders[key(0, 0)]) > 1)
    assert after.missing() == []
    await cluster.stop()
    assert "layer 0 expert 0" in caplog.text
    assert "a copy comes to" in caplog.text


async def test_copies_go_by_themselves_once_they_are_cold_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(pools={"expert": (4, 50)})
    rebalancer = cluster.rebalancer
    assert rebalancer.tracker.fall_s == FALL_S
    await cluster.start()
    await cluster.complete()
    hot, cold = key(1, 2), key(0, 1)
    rates = dict.fromkeys(cluster.state.placement.holders, 1000)
    for expert in (hot, cold):
        told = await cluster.controller.set_copies(*expert, 3, False)
        assert told["report"].outcome == "committed"
    await busy(cluster, {**rates, hot: 3000, cold: 1})
    # What was asked for is not known for long enough yet.
    assert (await rebalancer.rebalance(least_gain=9.0)).outcome == "balanced"
    assert len(cluster.state.placement.holders[cold]) == 3
    monkeypatch.setattr(rebalancer, "_cold_at_s", 0.0)
    dry = await rebalancer.rebalance(dry_run=True, least_gain=9.0)
    assert (dry.outcome, dry.moved_bytes) == ("planned", 0)
    report = await rebalancer.rebalance(least_gain=9.0)
    assert (report.outcome, report.moves) == ("committed", dry.moves)
    assert {(move.expert, move.is_added) for move in report.moves} == {(1, False)}
    placement = await settled(cluster, 1)
    assert [len(placement.holders[expert]) for expert in (hot, cold)] == [3, 1]
    assert (await rebalancer.rebalance(least_gain=9.0)).outcome == "balanced"
    restart(rebalancer.tracker)  # nothing is asked for at all
    assert (await rebalancer.rebalance(least_gain=9.0)).outcome == "committed"
    placement = await settled(cluster, 1)
    assert {len(actors) for actors in placement.holders.values()} == {1}
    await cluster.controller.set_copies(*hot, 2, False)  # they are kept for a while
    assert (await rebalancer.rebalance(least_gain=9.0)).outcome == "balanced"


def test_changes_fit_into_what_the_ones_before_leave_free() -> None:
    a, b, c, d = (key(0, i) for i in range(4))
    # Two full devices with room for one more: four copies change places, one pair at a time.
    added = {"x": [c, d], "y": [a, b]}
    dropped = {"x": [a, b], "y": [c, d]}
    assert batches(added, dropped, {"x": 10, "y": 10}, {"m": 10}) == [
        Change({"x": [c], "y": [a]}, {"x": [a], "y": [c]}),
        Change({"x": [d], "y": [b]}, {"x": [b], "y": [d]}),
    ]
    assert len(batches(added, dropped, {"x": 20, "y": 20}, {"m": 10})) == 1


def test_what_finds_no_room_is_left_out_and_its_old_copy_stays() -> None:
    a, b = key(0, 0), key(0, 1)
    assert batches({"x": [a]}, {"y": [a, b]}, {"x": 5, "y": 0}, {"m": 10}) == [
        Change({}, {"y": [b]})
    ]
    assert batches({}, {}, {}, {}) == []


async def test_why_nothing_is_rebalanced_is_logged_once_until_it_changes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "expertmesh.rebalance")
    away, missing = (UnavailableError(why, "", 1.0) for why in ("one is away", "one is missing"))
    outcomes: list[Exception | None] = [away, away, away, missing, None, missing, missing]
    rebalancer, all_told = Cluster().rebalancer, asyncio.Event()

    async def rebalance(least_gain: float) -> None:
        if not outcomes:
            all_told.set()
            return
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(rebalancer, "rebalance", rebalance)
    task = asyncio.create_task(rebalancer.run_forever(0.0))
    async with asyncio.timeout(10):
        await all_told.wait()
    task.cancel()
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"did not rebalance: {one}" for one in (away, missing, missing)]
