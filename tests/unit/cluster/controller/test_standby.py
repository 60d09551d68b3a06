"""Actors that stand by: started before they are needed, empty until then, and never in the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.controller.records.fleet import Fleet, PoolMembers
from cluster.placement.scaling import wanted_standby
from cluster.spec import ActorSpec, PoolSpec, ScalingTargets
from tests.unit.cluster.controller.fakes import (
    TARGETS,
    FakePool,
    autoscaled,
    done,
    happens,
    never_lost,
    settled,
    sizes,
)

pytestmark = pytest.mark.usefixtures("short_periods", "quick_scaling")

SPEC = ActorSpec("app", (), 0.1, 0.0, 1, 100)
NEVER_S = 1000.0
"""A delay that no test lives to see the end of."""


def targets(**changes: Any) -> ScalingTargets:
    return replace(TARGETS, **{"standby_actors": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "in_use", "expected"),
    [
        ({"standby_actors": 0}, 1, 0),
        ({"standby_actors": 2}, 1, 2),
        ({"standby_actors": 2}, 3, 1),
        ({"standby_actors": 2}, 4, 0),
        ({"standby_actors": 2}, 5, 0),
        ({"dry_run": True}, 1, 0),
    ],
)
def test_so_many_stand_by_as_there_may_be_more(
    changes: dict[str, Any], in_use: int, expected: int
) -> None:
    assert wanted_standby(targets(**changes), in_use) == expected


def fleet_of(num_actors: int) -> Fleet:
    return Fleet([PoolSpec("a", num_actors, 30, SPEC, targets())])


def test_who_stands_by_belongs_to_the_fleet_and_is_not_in_use() -> None:
    fleet = fleet_of(2)
    assert fleet.add("a", is_standby=True) == "a-2"
    assert (fleet.of("a"), fleet.standby_of("a")) == (["a-0", "a-1"], ["a-2"])
    assert fleet.in_use() == ["a-0", "a-1"]
    assert fleet.specs.keys() == {"a-0", "a-1", "a-2"}
    assert fleet.add("a") == "a-3"
    fleet.take_into_use("a-2")  # it counts as one that joins now
    assert fleet.of("a") == fleet.in_use() == ["a-0", "a-1", "a-3", "a-2"]
    fleet.add("a", is_standby=True)
    fleet.remove("a-4")
    assert fleet.standby == set()


@pytest.mark.parametrize(
    ("configured", "in_use", "standby"),
    [(2, ["a-0", "a-4"], ["a-1"]), (3, ["a-0", "a-4", "a-1"], []), (1, ["a-0"], ["a-1"])],
)
def test_a_next_controller_knows_who_stood_by(
    configured: int, in_use: list[str], standby: list[str]
) -> None:
    kept = PoolMembers(2, ("a-0", "a-4"), ("a-1",))
    fleet = fleet_of(configured)
    fleet.resume({"a": kept})
    assert (fleet.of("a"), fleet.standby_of("a")) == (in_use, standby)
    assert fleet.members()["a"].standby == tuple(standby)
    assert fleet.budgets_bytes == dict.fromkeys(fleet.specs, 30)


async def test_growing_takes_who_stands_by_and_another_one_is_started() -> None:
    cluster = await autoscaled(standby_actors=1, downscale_delay_s=NEVER_S)
    placement = await cluster.until(lambda p: "expert-2" in p.generations)
    assert sizes(placement) == {"expert-0": 4, "expert-1": 4, "expert-2": 0}
    rebalanced = await cluster.controller.rebalance(False)
    assert rebalanced["report"].outcome == "balanced"
    told = await cluster.controller.load()
    assert told.layers_balance == told.devices_balance == 1.0
    assert {one.actor_id: one.experts for one in told.devices}["expert-2"] == 0
    since, [before] = len(cluster.published), cluster.pool.of("expert-2")
    grown = await done(cluster.controller.scale(3, "", False))
    assert (grown.outcome, grown.added) == ("committed", ("expert-2",))
    assert cluster.pool.of("expert-2") == [before]
    assert before.keys
    placement = await cluster.until(lambda p: "expert-3" in p.generations)
    assert sizes(placement)["expert-3"] == 0
    # With the most there may be nobody stands by, and nobody more is started.
    grown = await done(cluster.controller.scale(4, "", False))
    assert grown.added == ("expert-3",)
    shrunk = await done(cluster.controller.scale(3, "", False))
    assert len(shrunk.removed) == 1
    await cluster.until(lambda p: len(p.generations) == 4)
    assert never_lost(cluster, since)


async def test_who_stands_by_beyond_the_bounds_is_ended() -> None:
    cluster = await autoscaled(standby_actors=2, downscale_delay_s=NEVER_S)
    await cluster.until(lambda p: len(p.generations) == 4)
    cluster.state.fleet.add("expert")  # as one that comes up while others are taken
    cluster.state.shares["expert-4"] = []
    cluster.keeper.start("expert-4")
    await happens(lambda: len(cluster.state.fleet.standby) == 1)
    await happens(lambda: sum(actor.alive for actor in cluster.pool.actors) == 4)
    await settled(cluster, 1)


async def test_a_next_controller_adopts_who_stands_by() -> None:
    pool = FakePool()
    cluster = await autoscaled(pool, standby_actors=1, downscale_delay_s=NEVER_S)
    await cluster.until(lambda p: "expert-2" in p.generations)
    await cluster.stop()
    cluster = await autoscaled(pool, standby_actors=1, downscale_delay_s=NEVER_S)
    assert cluster.state.fleet.standby == {"expert-2"}
    assert sizes(cluster.state.placement) == {"expert-0": 4, "expert-1": 4, "expert-2": 0}
    assert [actor.actor_id for actor in pool.actors] == ["expert-0", "expert-1", "expert-2"]


async def test_successors_of_a_node_that_goes_are_those_who_stand_by_elsewhere() -> None:
    pool = FakePool("n0", "n1", "n2", "n1")
    cluster = await autoscaled(pool, standby_actors=2, downscale_delay_s=NEVER_S)
    await cluster.until(lambda p: len(p.generations) == 4)
    pool.node_ids, pool.draining_ids = ["n0", "n2"], {"n1"}
    await happens(lambda: all(a.node != "n1" for a in pool.actors if a.alive))
    placement = await settled(cluster, 1)
    assert sizes(placement)["expert-0"] == sizes(placement)["expert-2"] == 4
    assert cluster.state.fleet.in_use() == ["expert-0", "expert-2"]
