"""A slow actor over a fake pool: from what routers measure to status, log and fewer experts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import pytest

from cluster.placement import slowness as slowness_module
from cluster.reports import Measurements, Samples
from router.cli.status import _summary
from router.observability.exposition import expose
from tests.unit.cluster.controller.fakes import Cluster, busy, happens, settled, sizes, started

pytestmark = pytest.mark.usefixtures("short_periods")
ACTORS = [f"expert-{i}" for i in range(4)]
SLOW = "expert-2"


class Router:
    """A router that tells the controller again and again what it measures."""

    def __init__(self, cluster: Cluster) -> None:
        self.slowness: Mapping[str, float] = {}
        self._cluster = cluster
        self._reports = 0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        controller, state = self._cluster.controller, self._cluster.state
        while True:
            by_actor = {(actor_id, 1): times for actor_id, times in self.slowness.items()}
            samples = Samples(time.monotonic(), {}, by_actor)
            await controller.watch("router", 9, "n", state.placement.order, 0.0, samples, "m")
            self._reports += 1
            await asyncio.sleep(0.005)

    async def measure(self, slowness: Mapping[str, float]) -> None:
        """Measure this from now on; returns once the controller has had it a few times."""
        self.slowness = slowness
        enough = self._reports + 4
        await happens(lambda: self._reports >= enough)

    def close(self) -> None:
        self._task.cancel()


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
    router = Router(cluster)
    before = sizes(placement)
    assert before[SLOW] == 4

    async def rebalanced() -> str:
        await busy(cluster, dict.fromkeys(placement.holders, 10_000))
        answer = await cluster.controller.rebalance(False)
        return str(answer["report"].outcome)

    assert await rebalanced() == "balanced"
    await router.measure(usual | {SLOW: 5.1})
    await router.measure(usual | {SLOW: 5.3})
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
        await router.measure(usual | {SLOW: slowness})
        assert await rebalanced() == "balanced"
    await router.measure(usual)
    assert "slow" not in _summary(await cluster.controller.status())
    assert caplog.text.count("expert-2 is no longer slow") == 1
    await rebalanced()  # unless the controller's own rebalancing came first
    assert sizes(await settled(cluster, 2))[SLOW] > relieved[SLOW]
    router.close()


async def test_actors_of_a_slower_pool_are_not_slow(caplog: pytest.LogCaptureFixture) -> None:
    cluster = await started(pools={"fast": (2, 100), "mild": (2, 100)})
    router = Router(cluster)
    slowness = {"fast-0": 1.0, "fast-1": 1.0, "mild-0": 8.0, "mild-1": 8.0}
    await router.measure(slowness)
    status = await cluster.controller.status()
    assert {actor.slowness for actor in status.actors} == {1.0}
    assert not any(actor.is_slow for actor in status.actors)
    router.close()
    await cluster.stop()
    assert "is slow" not in caplog.text
