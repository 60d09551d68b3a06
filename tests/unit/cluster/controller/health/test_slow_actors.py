"""A slow actor over a fake pool: from what routers measure to status, log and fewer experts."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from cluster.placement import slowness as slowness_module
from cluster.reports import Measurements, Samples
from router.cli.status import _summary
from router.observability.exposition import expose
from tests.unit.cluster.controller.fakes import (
    Cluster,
    busy,
    happens,
    router_of,
    settled,
    sizes,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")
ACTORS = [f"expert-{i}" for i in range(4)]
SLOW = "expert-2"


class Measured:
    """What a router measures."""

    def __init__(self) -> None:
        self._slowness: Mapping[str, float] = {}
        self._reports = 0

    def samples(self) -> Samples:
        self._reports += 1
        by_actor = {(actor_id, 1): times for actor_id, times in self._slowness.items()}
        return Samples(time.monotonic(), {}, by_actor)

    async def are(self, slowness: Mapping[str, float]) -> None:
        """Measure this from now on; returns once the controller has had it a few times."""
        self._slowness, enough = slowness, self._reports + 4
        await happens(lambda: self._reports >= enough)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have measurements count at once; tests/unit/cluster/placement has how long they take."""
    monkeypatch.setattr(slowness_module, "SURE_S", 0.0)
    monkeypatch.setattr(slowness_module, "RECOVERY_S", 0.0)


async def test_a_slow_actor_is_said_once_and_gets_fewer_experts_until_it_is_fast_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    usual = dict.fromkeys(ACTORS, 1.0)
    caplog.set_level("INFO")
    cluster = Cluster(4, min_copies=2)
    await cluster.start()
    placement = await settled(cluster, 2)
    before = sizes(placement)
    assert before[SLOW] == 4
    measured = Measured()

    async def rebalanced() -> str:
        await busy(cluster, dict.fromkeys(placement.holders, 10_000))
        answer = await cluster.controller.rebalance(False)
        return str(answer["report"].outcome)

    async with router_of(cluster, samples=measured.samples):
        assert await rebalanced() == "balanced"
        await measured.are(usual | {SLOW: 5.1})
        await measured.are(usual | {SLOW: 5.3})
        status = await cluster.controller.status()
        assert "slow: expert-2, 5.3 times as long as its twins" in _summary(status)
        assert caplog.text.count("expert-2 g1 on node is slow") == 1
        text = expose(Measurements(status, (), ()), None).decode()
        assert 'expertmesh_actor_slowness{actor_id="expert-2"} 5.3' in text
        assert 'expertmesh_actor_slowness{actor_id="expert-0"} 1.0' in text
        await rebalanced()  # unless the controller's own rebalancing came first
        relieved = sizes(await settled(cluster, 2))
        assert relieved[SLOW] <= 2
        assert sum(relieved.values()) == sum(before.values())
        for slowness in (4.4, 6.2, 5.0):  # no going to and fro with the measurement
            await measured.are(usual | {SLOW: slowness})
            assert await rebalanced() == "balanced"
        await measured.are(usual)
        assert "slow" not in _summary(await cluster.controller.status())
        assert caplog.text.count("expert-2 is no longer slow") == 1
        await rebalanced()  # unless the controller's own rebalancing came first
        assert sizes(await settled(cluster, 2))[SLOW] > relieved[SLOW]


async def test_actors_of_a_slower_pool_are_not_slow(caplog: pytest.LogCaptureFixture) -> None:
    cluster = await started(pools={"fast": (2, 100), "mild": (2, 100)})
    measured = Measured()
    async with router_of(cluster, samples=measured.samples):
        await measured.are({"fast-0": 1.0, "fast-1": 1.0, "mild-0": 8.0, "mild-1": 8.0})
        status = await cluster.controller.status()
    assert {actor.slowness for actor in status.actors} == {1.0}
    assert not any(actor.is_slow for actor in status.actors)
    assert "is slow" not in caplog.text
