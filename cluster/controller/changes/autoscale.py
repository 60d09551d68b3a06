"""Automatic changes of the fleet: pools follow their load, and actors leave draining nodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.controller.changes.elastic import Elastic
from cluster.controller.changes.leaving import LeavingNodes
from cluster.controller.changes.rebalance import Moved
from cluster.controller.records.pool import kind_of
from cluster.controller.records.state import ClusterState
from cluster.errors import ExpertMeshError
from cluster.placement.scaling import RECENT_S, SIGNAL_S, BusyMeter, ScalingPolicy, Wanted

CHECK_S = 0.25
DRAINING_CHECK_S = 1.0
DRAIN_S = 1.0
"""How long it takes to drain and end actors whose experts have other copies."""

logger = logging.getLogger("expertmesh.scaling")


class Autoscaler:
    """Makes each autoscaled pool follow its load, with one policy per pool."""

    def __init__(
        self, state: ClusterState, elastic: Elastic, leaving: LeavingNodes, meter: BusyMeter
    ) -> None:
        """``meter`` measures the actors' load, ``elastic`` changes their number."""
        self._state = state
        self._elastic = elastic
        self._leaving = leaving
        self._meter = meter
        self._policies = {
            name: ScalingPolicy(spec.autoscaling, SIGNAL_S + CHECK_S + DRAIN_S)
            for name, spec in state.fleet.pools.items()
            if spec.autoscaling is not None
        }
        self._planned: dict[str, int] = {}
        """The number of actors that each pool in dry run would last have scaled to."""

    async def run_forever(self) -> None:
        """Follow the load, use actors that came up late, keep standbys, leave draining nodes."""
        await asyncio.gather(
            _repeat(self._follow_load, CHECK_S),
            _repeat(self._elastic.use_empty, CHECK_S),
            _repeat(self._elastic.keep_standby, CHECK_S),
            _repeat(self._leaving.look, DRAINING_CHECK_S),
        )

    async def _follow_load(self) -> None:
        for pool, policy in self._policies.items():
            actors = self._state.fleet.of(pool)
            living = [a for a in actors if a in self._state.placement.generations]
            signals = self._meter.signals(living, SIGNAL_S, pool) if living else None
            recent = self._meter.signals(living, RECENT_S, pool) if living else None
            wanted = policy.decide(len(actors), signals, time.monotonic(), recent)
            if wanted is None or (wanted.actors < len(actors) and self._state.retained):
                continue  # ending an actor would end requests of an earlier deployment's models
            what = f"{pool}: {len(actors)} -> {wanted.actors} actors"
            if policy.targets.dry_run:
                self._report_plan(pool, what, wanted)
                continue
            try:
                await self._elastic.scale(wanted.actors, pool, reason=wanted.reason)
            except ExpertMeshError as error:
                failed = Moved(f"failed: {error}")
                self._elastic.report(what, wanted.reason, failed, time.monotonic())

    def _report_plan(self, pool: str, what: str, wanted: Wanted) -> None:
        """Report what a pool would do, and again only when that changes."""
        if self._planned.get(pool) == wanted.actors:
            return
        self._planned[pool] = wanted.actors
        report = self._elastic.report(what, wanted.reason, Moved("planned"), time.monotonic())
        self._elastic.history.appendleft(report)


async def _repeat(step: Callable[[], Awaitable[None]], period_s: float) -> None:
    while True:
        await asyncio.sleep(period_s)
        try:
            await step()
        except ExpertMeshError as error:
            logger.info("did not scale: %s", error)
        except Exception as error:  # Ray's control store may be away for a moment
            logger.warning("did not scale (%s)", kind_of(error), exc_info=True)
