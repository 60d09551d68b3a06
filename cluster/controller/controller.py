"""The controller: keeps every expert on a living actor, and publishes which actor holds which.

:class:`Controller` puts the parts together, adopts or creates the actors at its start, and answers
routers and gateways. All parts run on one event loop, so the placement changes one step at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.application import app_is_wanted
from cluster.controller.changes.anti_affinity import AntiAffinity
from cluster.controller.changes.autoscale import Autoscaler
from cluster.controller.changes.elastic import Elastic
from cluster.controller.changes.leaving import LeavingNodes
from cluster.controller.changes.rebalance import Rebalancer
from cluster.controller.changes.relief import Reliever
from cluster.controller.health.slow_actors import SlowNotice
from cluster.controller.lifecycle.keeper import Keeper
from cluster.controller.records.adopt import Adopted, adopt
from cluster.controller.records.changes import Changes, Retirement
from cluster.controller.records.fleet import Fleet
from cluster.controller.records.kernels import MixNotice, kernel_status, with_ids
from cluster.controller.records.ledger import LedgerStore
from cluster.controller.records.members import MEMBER_TTL_S, Members
from cluster.controller.records.naming import Report, actor_status, named, with_model_ids
from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.controller.records.state import ClusterState
from cluster.errors import ExpertMeshError, StaleEpochError
from cluster.placement.load import FALL_S, LoadTracker
from cluster.placement.placement import Placement
from cluster.placement.retained import Retention
from cluster.placement.scaling import BusyMeter
from cluster.reports import (
    ClusterStatus,
    Heard,
    KernelStatus,
    LoadStatus,
    Measurements,
    ProcessSamples,
    ProcessStatus,
    Samples,
)
from cluster.spec import ActorReport, ExpertKey, PoolSpec, model_id_of

ADOPT_TIMEOUT_S, START_TIMEOUT_S, MAX_WATCH_S = 3.0, 30.0, 10.0
APP_CHECK_S = RETAIN_CHECK_S = 1.0

logger = logging.getLogger("expertmesh.controller")


class Controller:
    """Keeps the expert actors of one application; a Serve deployment of one replica."""

    def __init__(
        self,
        app: str,
        pools: Sequence[PoolSpec],
        expert_pool: ExpertPool,
        ledger: LedgerStore,
        min_copies: int = 1,
        rebalance_period_s: float | None = None,
        redeploy_drain_s: float = 600.0,
    ) -> None:
        """Set up; :meth:`start` adopts or creates the actors.

        ``redeploy_drain_s`` bounds how long experts of an earlier deployment with other weights
        stay. ``expert_pool`` is Ray's side of the actors, ``ledger`` keeps the state that must
        outlive them. Copies follow the load every ``rebalance_period_s``, or only when
        :meth:`rebalance` is called.
        """
        self._app = app
        self._expert_pool = expert_pool
        self._ledger = ledger
        self._rebalance_period_s = rebalance_period_s
        self._redeploy_drain_s = redeploy_drain_s
        models = [source.experts for source in pools[0].actor.models]
        self._state = ClusterState(models, Fleet(pools), min_copies, ledger)
        self._members = Members()
        self._mix_notice = MixNotice()
        self._slow_notice = SlowNotice(self._state)
        targets = [spec.autoscaling for spec in pools if spec.autoscaling]
        fall_s = min((target.downscale_delay_s for target in targets), default=FALL_S)
        tracker, meter = LoadTracker(time.monotonic(), fall_s), BusyMeter()
        self._retirement = Retirement(self._state, expert_pool, self._members)
        self._keeper = Keeper(
            self._state,
            expert_pool,
            self._retirement,
            (tracker, meter),
            rebalance_period_s,
            self._members,
        )
        self._state.on_superseded = self._stop
        changes = Changes(self._state, expert_pool, self._retirement, self._keeper.heartbeat_now)
        self._rebalancer = Rebalancer(self._state, changes, tracker, self._slow_notice)
        self._elastic = Elastic(self._state, expert_pool, self._keeper, self._rebalancer, meter)
        report, deaths = self._elastic.report, self._keeper.deaths
        self._reliever = Reliever(self._state, deaths, self._rebalancer, report)
        self._keeper.relieve = self._reliever.relieve
        self._keeper.relieve_waiting = self._reliever.relieve_waiting
        self._leaving = LeavingNodes(self._state, expert_pool, self._elastic)
        self._autoscaler = Autoscaler(self._state, self._elastic, self._leaving, meter)
        self._loops: list[asyncio.Task[None]] = []

    # The loop.

    async def start(self) -> None:
        """Begin the next epoch, adopt the living actors that fit, and keep all actors alive."""
        adopted = await self._adopt()
        handles = adopted.handles
        nodes = await asyncio.to_thread(self._expert_pool.nodes)
        if self._state.min_copies > 1 and len(nodes) > 1:
            # Only before anything is served is there time to wait for all actors.
            handles = handles or await self._create_all()
        self._state.assign()
        await self._state.make_room(adopted.reports)
        for actor_id in self._state.fleet.specs:
            self._keeper.start(actor_id, handles.get(actor_id), actor_id in adopted.silent)
        if self._state.min_copies > 1:
            anti_affinity = AntiAffinity(
                self._state, self._expert_pool, self._keeper, self._members
            )
            self._run(anti_affinity.run_forever(set(nodes)), "nodes")
        if self._rebalance_period_s is not None:
            self._run(self._rebalancer.run_forever(self._rebalance_period_s), "rebalance")
        self._run(self._autoscaler.run_forever(), "scale")
        self._run(self._retain(), "retain")

    def _run(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        self._loops.append(asyncio.create_task(loop, name=name))

    def _stop(self) -> None:
        """Give no more orders; the actors keep running."""
        for loop in self._loops:
            if loop is not asyncio.current_task():
                loop.cancel()
        self._reliever.close()
        self._keeper.close()

    async def check_health(self) -> None:
        """Raise :class:`StaleEpochError` if a newer controller runs, so that Serve ends this."""
        self._state.refuse_if_superseded()

    async def _retain(self) -> None:
        """Keep the models of an earlier deployment until their routers have ended."""
        retention = Retention(time.monotonic(), MEMBER_TTL_S, self._redeploy_drain_s)
        while self._state.retained:
            await asyncio.sleep(RETAIN_CHECK_S)
            over = retention.over(
                self._state.retained,
                self._members.models(),
                self._state.is_complete(),
                time.monotonic(),
            )
            for model, reason in over.items():
                logger.info("ending the previous model %s: %s", model, reason)
            if over:
                holders = self._state.placement.held()
                await self._state.release(over)
                self._retirement.begin(holders, self._state.placement.order)
                try:
                    await self._state.try_record("that the previous models ended")
                except StaleEpochError:
                    return

    async def _adopt(self) -> Adopted:
        """Claim the next epoch, and take over the last controller's actors under it."""
        ledger = await asyncio.to_thread(self._ledger.claim)
        self._state.fleet.resume(ledger.pools)
        specs, check = self._state.fleet.specs, self._state.check_epoch
        adopted = await adopt(self._expert_pool, specs, ledger.epoch, ADOPT_TIMEOUT_S, check)
        if adopted.epoch >= ledger.epoch:  # the ledger was lost
            ledger = await asyncio.to_thread(self._ledger.claim, adopted.epoch)
        await self._state.take_over(adopted, ledger)
        return adopted

    async def _create_all(self) -> dict[str, ActorHandle]:
        """Create all actors, and wait until Ray has placed them; returns their handles.

        Copies can be put on different nodes only when the actors' nodes are known. An actor that
        does not come up in time counts as if it had a node of its own.
        """
        created = {a: await self._keeper.processes.create(a) for a in self._state.fleet.specs}

        async def learn_node(actor_id: str, handle: ActorHandle) -> None:
            try:
                report = await self._expert_pool.describe(handle, START_TIMEOUT_S)
            except (RayActorError, RayTaskError, TimeoutError) as error:
                logger.warning("%s did not report its node (%s)", actor_id, kind_of(error))
            else:
                self._state.nodes[actor_id] = report.node

        await asyncio.gather(*(learn_node(*entry) for entry in created.items()))
        return created

    async def look_for_deletion(self) -> None:
        """Ask Serve every :data:`APP_CHECK_S` whether it deletes the application; if so, tell all.

        A shutdown of Serve ends gateways first, then routers, then the controller, each after its
        last request, and tells none of them why.
        """
        while not self._state.is_deleted:
            await asyncio.sleep(APP_CHECK_S)
            try:
                is_wanted = await asyncio.to_thread(app_is_wanted, self._app)
            except Exception as error:  # Serve itself is away, which proves nothing
                logger.warning("Serve does not answer (%s)", kind_of(error))
                continue
            if not is_wanted:
                await self._state.mark_deleted()

    async def close(self) -> None:
        """Stop keeping; end the actors too when Serve is deleting the application.

        On a restart or a new configuration they keep running, and the next controller adopts them.
        """
        self._stop()
        if await asyncio.to_thread(app_is_wanted, self._app):
            return
        try:
            await self._state.check_epoch()
            for _, _, handle in await asyncio.to_thread(self._expert_pool.find):
                self._expert_pool.kill(handle)
            await asyncio.to_thread(self._ledger.clear)
        except StaleEpochError:
            logger.info("a newer controller is running; leaving the actors to it")

    # What routers and gateways call.

    async def watch(
        self,
        kind: str,
        pid: int,
        node: str,
        known: tuple[int, int],
        timeout_s: float,
        samples: Samples | None = None,
        model: str = "",
        kernel_class: str = "",
        heard: Mapping[str, Heard] | None = None,
        own: Placement | None = None,
    ) -> dict[str, Any]:
        """Return the placement once it differs from ``known`` (epoch, version).

        The answer has the :class:`Placement` (``placement``), ``None`` when nothing changed within
        ``timeout_s`` (at most ``MAX_WATCH_S``), how long ago this controller last finished a
        heartbeat of any actor (``loop_age_s``), whether Serve deletes the application
        (``is_deleted``), whether the next call is to bring the caller's ``own`` placement
        (``asks_own``), the ``epoch``, the kernel classes of the ``model``'s placed experts
        (``expert_classes``), and for a gateway the quota ``uses`` of all other gateways. The call
        also proves that this router or gateway is alive, and brings its ``samples``, the key of the
        ``model`` that a router serves, the ``kernel_class`` of its dense part, and the actors that
        it has ``heard`` lately.

        When the controller doubts whether an actor lives, it answers all callers at once, and their
        next calls say whom they hear. Raises :class:`StaleEpochError` if a newer controller runs.
        """
        state, order, asked_at_s = self._state, (known[0], known[1]), self._state.asked_at_s
        state.refuse_if_superseded()
        process = ProcessStatus(pid, node)
        self._members.heard(kind, process, order, samples, model, kernel_class, heard)
        self._mix_notice.look(self._kernels(), state.is_complete)
        self._slow_notice.look(self._members.slowness(), time.monotonic())
        for actor_id in self._retirement.waiting():
            self._keeper.heartbeat_now(actor_id)
        if own is not None:
            await state.learn(own)
        asks_own = bool(state.unheard) and -1 < order[0] < state.placement.epoch
        if not asks_own:
            try:
                async with asyncio.timeout(min(timeout_s, MAX_WATCH_S)):
                    await state.wait_for(
                        lambda: (
                            state.is_deleted
                            or state.placement.order != order
                            or state.asked_at_s > asked_at_s
                        )
                    )
            except TimeoutError:
                pass
        is_known = asks_own or state.placement.order == order
        return {
            "placement": None if is_known else state.placement,
            "loop_age_s": time.monotonic() - self._keeper.looped_at_s,
            "is_deleted": state.is_deleted,
            "asks_own": asks_own,
            "epoch": state.placement.epoch,
            "expert_classes": state.kernels.classes(model, state.placement),
            "uses": self._members.uses(process) if kind == "gateway" else {},
        }

    async def suspect(self, actor_id: str, generation: int, hears_others: bool = False) -> None:
        """Check an actor at once, since a router has no answer from this generation.

        ``hears_others`` says that the router hears other actors.
        """
        self._keeper.suspect(actor_id, generation, hears_others)

    async def status(self) -> ClusterStatus:
        """Return the processes that serve, and the experts of each actor."""
        self._state.refuse_if_superseded()
        return self._status()

    async def measurements(self, own: ProcessSamples) -> Measurements:
        """Return all measurements; ``own`` are the samples of the gateway that asks."""
        self._state.refuse_if_superseded()
        self._members.heard(own.kind, own.process, samples=own.samples)
        return Measurements(self._status(), self._reports(), self._members.samples())

    def _reports(self) -> tuple[ActorReport, ...]:
        """Return the actors' reports of the deployment's own models, named by their ids."""
        return tuple(
            named(report, self._state.keys) for _, report in sorted(self._state.reports.items())
        )

    def _routers(self) -> list[ProcessStatus]:
        """Return the routers, with the kernel classes of the deployment's own models."""
        keys, routers = self._state.keys, self._members.of("router")
        return [replace(router, kernels=with_ids(router.kernels, keys)) for router in routers]

    def _kernels(self) -> tuple[KernelStatus, ...]:
        keys, reports = self._state.keys, self._state.reports.values()
        return kernel_status(
            [model_id_of(experts.model) for experts in self._state.models],
            [with_ids(report.kernels, keys) for report in reports],
            [router.kernels for router in self._routers()],
        )

    def _status(self) -> ClusterStatus:
        placement, silences = self._state.placement, self._keeper.suspicion.notes()
        return ClusterStatus(
            models=tuple(model_id_of(experts.model) for experts in self._state.models),
            epoch=placement.epoch,
            placement_version=placement.version,
            controller_pid=os.getpid(),
            missing_experts=sum(key.model in self._state.keys for key in placement.missing()),
            routers=tuple(self._routers()),
            gateways=self._members.of("gateway"),
            actors=tuple(
                self._slow_notice.marked(actor_status(report, silences.get(report.actor_id, "")))
                for report in self._reports()
            ),
            min_copies=self._state.min_copies,
            live_copies=placement.fewest_copies(self._state.keys),
            loading=self._keeper.loading.status(),
            kernels=self._kernels(),
            failing=self._keeper.deaths.status(time.monotonic()),
        )

    async def load(self) -> LoadStatus:
        """Return the recent load of experts and devices, and the last changes."""
        self._state.refuse_if_superseded()
        load = self._rebalancer.load()
        return replace(
            load,
            rebalances=tuple(map(with_model_ids, load.rebalances)),
            changes=tuple(map(with_model_ids, self._elastic.history)),
        )

    # Each of the following returns ``{"report": …}``, or ``{"error": …}`` as plain data.

    async def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """Spread the current load, or only plan it; see :meth:`Rebalancer.rebalance`."""
        return await self._outcome(self._rebalancer.rebalance(dry_run))

    async def scale(self, number: int, pool: str, dry_run: bool) -> dict[str, Any]:
        """Bring a pool to ``number`` actors; see :meth:`Elastic.scale`."""
        return await self._outcome(self._elastic.scale(number, pool, dry_run))

    async def drain(self, target: str, dry_run: bool) -> dict[str, Any]:
        """Drain an actor or a node; see :meth:`Elastic.drain`, :meth:`LeavingNodes.drain`."""
        drains = self._elastic if target in self._state.fleet.specs else self._leaving
        return await self._outcome(drains.drain(target, dry_run))

    async def set_copies(
        self, model: str, layer: int, expert: int, number: int, dry_run: bool, of_all: bool = False
    ) -> dict[str, Any]:
        """Bring an expert to ``number`` copies; see :meth:`Elastic.set_copies`."""
        keys = [key for key in self._state.keys if model_id_of(key) == model]
        key = ExpertKey(keys[0] if keys else model, layer, expert)
        return await self._outcome(self._elastic.set_copies(key, number, dry_run, of_all))

    async def _outcome(self, change: Coroutine[Any, Any, Report]) -> dict[str, Any]:
        """Return a change's report, or its error as plain data; Serve would wrap a raised error."""
        try:
            self._state.refuse_if_superseded()
            return {"report": with_model_ids(await change)}
        except ExpertMeshError as error:
            change.close()
            return {"error": error.to_wire()}
