"""The controller: keeps every expert on a living actor and publishes who holds what.

One coroutine per actor keeps it alive: create, load, publish, then heartbeats; on death publish
the loss, create the next generation, load, publish. All of them run on one event loop, so a
placement changes in one place and one step at a time. Actors are detached: they outlive a
controller, and the next one adopts them under a higher epoch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.adopt import adopt
from cluster.controller.anti_affinity import Apart
from cluster.controller.application import app_is_wanted
from cluster.controller.changes import LOAD_TIMEOUT_S, Changes
from cluster.controller.elastic import Elastic
from cluster.controller.fleet import Fleet
from cluster.controller.ledger import Ledger
from cluster.controller.liveness import LOOK_S, Progress, Silence
from cluster.controller.loading import Loading
from cluster.controller.members import Members
from cluster.controller.pool import ExpertPool, cause_of, kind_of, reason_of
from cluster.controller.rebalance import Rebalancer
from cluster.errors import ExpertMeshError, StaleEpochError
from cluster.placement.placement import Placement, assign_experts, empty_placement
from cluster.reports import (
    ActorStatus,
    ChangeReport,
    ClusterStatus,
    Measurements,
    ProcessSamples,
    ProcessStatus,
    Samples,
)
from cluster.spec import ActorReport, ExpertKey, PoolSpec

HEARTBEAT_PERIOD_S = 1.0
LOAD_PERIOD_S = 0.25
MAX_LOOKS_PER_S = 400
ADOPT_TIMEOUT_S = 3.0
SUSPICION_S = 1.0
"""How long a router's word counts, which it repeats for as long as it waits."""
APP_CHECK_S = 1.0
START_TIMEOUT_S = 30.0
MAX_WATCH_S = 10.0
PLACE_NOTICE_S = 10.0
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 15.0

logger = logging.getLogger("expertmesh.controller")


class Controller:
    """Keeps the expert actors of one application; a Serve deployment of one replica."""

    def __init__(
        self,
        app: str,
        pools: Sequence[PoolSpec],
        actor_class: type,
        min_copies: int = 1,
        rebalance_period_s: float | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Set up; :meth:`start` adopts or creates the actors.

        Copies follow the load every ``rebalance_period_s``, or only when :meth:`rebalance` is
        called. New actors' processes have the variables of ``environment``.
        """
        self._app = app
        self._models = [source.experts for source in pools[0].actor.models]
        self._fleet = Fleet(pools)
        self._min_copies = min_copies
        self._pool = ExpertPool(app, self._fleet.specs, actor_class, environment)
        self._nodes: dict[str, str] = {}
        """The node that each actor runs on, or ran on last."""
        self._adopted: dict[str, tuple[ExpertKey, ...]] = {}
        """What each adopted actor held."""
        self._last_generation: defaultdict[str, int] = defaultdict(int)
        cluster = _Cluster(self)
        self._changes = Changes(cluster, self._assign(), min_copies)
        self._rebalancer = Rebalancer(self._models, self._fleet, min_copies, cluster, self._changes)
        self._rebalance_period_s = rebalance_period_s
        self._elastic = Elastic(
            self._models, self._fleet, min_copies, cluster, self._changes, self._rebalancer
        )
        self._placement: Placement = empty_placement(0, self._models)
        self._changed = asyncio.Condition()
        self._reports: dict[str, ActorReport] = {}
        self._handles: dict[str, ActorHandle] = {}
        """The actors that are in the placement."""
        self._members = Members()
        self._loading = Loading()
        self._suspected: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._suspected_s: defaultdict[str, float] = defaultdict(lambda: -math.inf)
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._looped_s = time.monotonic()
        self._is_deleted = False

    async def start(self) -> None:
        """Take the next epoch, adopt the living actors that fit, and keep all of them alive."""
        handles = await self._adopt()
        nodes = await asyncio.to_thread(self._pool.nodes)
        if self._min_copies > 1 and len(nodes) > 1:
            # Only before anything is served is there time to wait for all actors.
            handles = handles or await self._start_all()
        self._changes.shares = self._assign()
        for actor_id in self._fleet.specs:
            self._start_keeping(actor_id, handles.get(actor_id))
        if self._min_copies > 1:
            apart = Apart(_Cluster(self), self._changes, self._nodes, self._min_copies)
            self._tasks.append(asyncio.create_task(apart.run_forever(set(nodes)), name="nodes"))
        if self._rebalance_period_s is not None:
            rebalancing = self._rebalancer.run_forever(self._rebalance_period_s)
            self._tasks.append(asyncio.create_task(rebalancing, name="rebalance"))
        scaling = self._elastic.run_forever()
        self._tasks.append(asyncio.create_task(scaling, name="scale"))

    def _start_keeping(self, actor_id: str, handle: ActorHandle | None = None) -> None:
        keeper = self._keep(actor_id, handle)
        self._keepers[actor_id] = asyncio.create_task(keeper, name=f"keep {actor_id}")

    async def _stop_keeping(self, actor_id: str) -> None:
        """End an actor that holds nothing any more, and let it leave the fleet."""
        self._fleet.remove(actor_id)
        self._write_ledger()
        await self._leave_placement(actor_id)
        keeper = self._keepers.pop(actor_id)
        keeper.cancel()
        await asyncio.wait([keeper])
        await self._leave_placement(actor_id)  # it may have come up until a moment ago
        self._forget(actor_id)
        self._changes.forget(actor_id)
        self._nodes.pop(actor_id, None)
        self._suspected.pop(actor_id, None)
        self._suspected_s.pop(actor_id, None)

    async def _leave_placement(self, actor_id: str) -> None:
        if actor_id in self._placement.generations:
            await self._publish(lambda placement: placement.without(actor_id))

    def _forget(self, actor_id: str) -> None:
        self._reports.pop(actor_id, None)
        self._handles.pop(actor_id, None)
        self._rebalancer.tracker.forget(actor_id)
        self._elastic.meter.forget(actor_id)

    def _assign(self) -> dict[str, list[ExpertKey]]:
        # An actor that is new to the pool is to get a share of what the others hold.
        actor_ids = self._fleet.in_use()
        is_same_pool = all(self._last_generation.get(a, 0) > 0 for a in actor_ids)
        held = self._adopted if is_same_pool else {}
        shares = assign_experts(
            self._models,
            actor_ids,
            self._fleet.budgets_bytes,
            self._min_copies,
            self._nodes,
            held,
        )
        return {**shares, **{actor_id: [] for actor_id in self._fleet.standby}}

    async def _start_all(self) -> dict[str, ActorHandle]:
        """Create all actors, and learn where Ray puts them.

        Copies can be put on different nodes only when the nodes are known. An actor that does not
        come up in time counts as one on a node of its own.
        """
        created = {actor_id: self._create(actor_id) for actor_id in self._fleet.specs}

        async def learn(actor_id: str, handle: ActorHandle) -> None:
            try:
                report = await self._pool.describe(handle, START_TIMEOUT_S)
            except (RayActorError, RayTaskError, TimeoutError) as error:
                logger.warning("%s: its node is not known (%s)", actor_id, kind_of(error))
            else:
                self._nodes[actor_id] = report.node

        await asyncio.gather(*(learn(actor_id, handle) for actor_id, handle in created.items()))
        return created

    async def _adopt(self) -> dict[str, ActorHandle]:
        ledger = await asyncio.to_thread(self._pool.ledger.read)
        self._fleet.resume(ledger.pools)
        adopted = await adopt(self._pool, self._fleet.specs, ADOPT_TIMEOUT_S)
        for known in (adopted.generations, ledger.generations):
            for actor_id, generation in known.items():
                last = self._last_generation[actor_id]
                self._last_generation[actor_id] = max(generation, last)
        placement = empty_placement(max(adopted.epoch, ledger.epoch) + 1, self._models)
        # From the first: an empty one would tell routers that living experts are lost.
        for actor_id, report in adopted.reports.items():
            placement = placement.with_actor(actor_id, report.generation, report.experts)
            self._nodes[actor_id] = report.node
            self._adopted[actor_id] = report.experts
        self._placement = placement
        self._write_ledger()
        return adopted.handles

    def _write_ledger(self) -> None:
        """Put down what the next controller must go beyond, even if no actor lives to tell it."""
        epoch, generations = self._placement.epoch, dict(self._last_generation)
        self._pool.ledger.write(Ledger(epoch, generations, self._fleet.members()))

    # Keeping one actor alive.

    async def _keep(self, actor_id: str, handle: ActorHandle | None) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            self._looped_s = time.monotonic()
            try:
                handle = handle or self._create(actor_id)
                await self._bring_up(actor_id, handle)
                delay_s = FIRST_RETRY_S
                await self._watch_actor(actor_id, handle)
            except StaleEpochError:
                logger.warning("a newer controller took over; this one stops")
                for task in self._tasks:
                    task.cancel()
                return
            except (RayActorError, RayTaskError, TimeoutError) as error:
                logger.warning("%s: %s", actor_id, reason_of(error))
            except ExpertMeshError as error:
                logger.error("%s: %s", actor_id, error)
            except asyncio.CancelledError:
                if actor_id not in self._fleet.specs and handle is not None:
                    self._pool.kill(handle)
                raise
            except Exception:
                logger.exception("%s: unexpected failure; trying again", actor_id)
            if handle is not None:
                self._pool.kill(handle)
                handle = None
            self._forget(actor_id)
            self._changes.looked_at()
            if actor_id in self._placement.generations:
                await self._publish(lambda placement: placement.without(actor_id))
            else:  # it never came up: do not spin
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)

    def _create(self, actor_id: str) -> ActorHandle:
        self._last_generation[actor_id] += 1
        generation = self._last_generation[actor_id]
        self._write_ledger()
        # Where its predecessor was, if it can be, so that copies stay on different nodes.
        node = self._nodes.get(actor_id) if self._min_copies > 1 else None
        return self._pool.create(actor_id, generation, self._placement.epoch, node)

    async def _bring_up(self, actor_id: str, handle: ActorHandle) -> None:
        started_s = time.monotonic()
        epoch, keys = self._placement.epoch, self._changes.shares[actor_id]
        waiting = asyncio.create_task(self._say_why_it_waits(actor_id, handle))
        following = asyncio.create_task(self._follow_loading(handle))
        self._loading.begin(actor_id, len(keys), started_s)
        try:
            report = await self._load_typed(handle, epoch, keys)
        finally:
            waiting.cancel()
            following.cancel()
            self._loading.end(actor_id)
        self._reports[actor_id], self._handles[actor_id] = report, handle
        self._nodes[actor_id] = report.node
        await self._publish(
            lambda placement: placement.with_actor(actor_id, report.generation, report.experts)
        )
        logger.info(
            "%s g%d on %s holds %d experts, pid %d, %.1f s%s",
            actor_id,
            report.generation,
            report.device,
            len(report.experts),
            report.pid,
            time.monotonic() - started_s,
            report.fetched(),
        )

    async def _say_why_it_waits(self, actor_id: str, handle: ActorHandle) -> None:
        """Log what an actor lacks that Ray finds no place for; Ray itself says nothing here.

        One that waits for a certain node is ended, and its successor may come on any.
        """
        for notices in itertools.count():
            await asyncio.sleep(PLACE_NOTICE_S * 2 ** min(notices, 5))
            try:
                await self._pool.describe(handle, PLACE_NOTICE_S)
                return  # it has a place, and loads
            except (RayActorError, RayTaskError):
                return
            except TimeoutError:
                why = await asyncio.to_thread(self._pool.shortage, actor_id)
                logger.warning("%s waits for a place: %s", actor_id, why)
                if self._min_copies > 1 and self._nodes.pop(actor_id, ""):
                    self._pool.kill(handle)
                    return

    async def _follow_loading(self, handle: ActorHandle) -> None:
        """See how far an actor is with its share, and log it for all that load together."""
        while True:
            await asyncio.sleep(HEARTBEAT_PERIOD_S)
            try:
                self._loading.saw(await self._pool.describe(handle, PLACE_NOTICE_S))
            except (RayActorError, RayTaskError, TimeoutError):
                continue  # it has not started, or died, which whoever waits for the load finds out
            if (line := self._loading.notice(time.monotonic())) is not None:
                logger.info("loading: %s", line)

    async def _load_typed(
        self, handle: ActorHandle, epoch: int, keys: list[ExpertKey]
    ) -> ActorReport:
        try:
            return await self._pool.load(handle, epoch, keys, LOAD_TIMEOUT_S)
        except RayTaskError as error:
            raise cause_of(error) from None

    async def _watch_actor(self, actor_id: str, handle: ActorHandle) -> None:
        suspected = self._suspected[actor_id]
        self._suspected_s[actor_id] = -math.inf  # what was said of its predecessor
        progress = Progress(time.monotonic())
        while True:
            suspected.clear()
            try:
                report = await self._heartbeat(actor_id, handle)
            except RayTaskError as error:
                raise cause_of(error) from None
            self._reports[actor_id] = report
            self._rebalancer.tracker.observe(report, time.monotonic())
            self._elastic.meter.observe(report, time.monotonic())
            self._looped_s = time.monotonic()
            if progress.is_hung(report.steps, report.queued_rows, time.monotonic()):
                raise TimeoutError("rows wait and none is computed")
            self._changes.looked_at()
            after = await self._changes.retire(actor_id, handle, report)
            if after is not None:
                self._reports[actor_id] = after
                self._changes.looked_at()
            try:
                async with asyncio.timeout(self._heartbeat_period_s()):
                    await suspected.wait()
            except TimeoutError:
                continue

    def _heartbeat_period_s(self) -> float:
        """Return how often an actor is looked at: more often where load changes what is where.

        As often as copies follow the load, which would else go by what they went by the last time.
        All looks together stay below :data:`MAX_LOOKS_PER_S`.
        """
        if self._rebalance_period_s is None and not self._elastic.follows_load:
            return HEARTBEAT_PERIOD_S
        period_s = min(LOAD_PERIOD_S, self._rebalance_period_s or LOAD_PERIOD_S)
        period_s = max(period_s, len(self._fleet.specs) / MAX_LOOKS_PER_S)
        return min(HEARTBEAT_PERIOD_S, period_s)

    async def _heartbeat(self, actor_id: str, handle: ActorHandle) -> ActorReport:
        """Return an actor's report; raises ``TimeoutError`` when it hangs."""
        answer = asyncio.ensure_future(self._pool.heartbeat(handle, self._placement.epoch))
        silence = Silence(time.monotonic())
        try:
            while not (await asyncio.wait([answer], timeout=LOOK_S))[0]:
                now_s = time.monotonic()
                is_suspected = now_s - self._suspected_s[actor_id] < SUSPICION_S
                if silence.is_hung(is_suspected, now_s):
                    raise TimeoutError("no heartbeat is answered")
            return answer.result()
        finally:
            answer.cancel()

    async def _publish(self, change: Callable[[Placement], Placement]) -> None:
        async with self._changed:
            # Applied under the lock: keepers that wait for it must not undo each other's changes.
            placement = change(self._placement)
            complete = self._placement.missing() and not placement.missing()
            self._placement = placement
            self._changed.notify_all()
        if complete:
            logger.info(
                "all %d experts have a live copy (epoch %d, placement %d)",
                len(placement.holders),
                *placement.order,
            )

    async def look_for_deletion(self) -> None:
        """Ask Serve again and again whether the application is to run; once it is not, tell all.

        A shutdown of Serve ends gateways first, then routers, then this, each after its last
        request, and tells none of them why.
        """
        while not self._is_deleted:
            await asyncio.sleep(APP_CHECK_S)
            try:
                wanted = await asyncio.to_thread(app_is_wanted, self._app)
            except Exception as error:  # Serve itself is away, which says nothing
                logger.warning("Serve does not answer (%s)", kind_of(error))
                continue
            async with self._changed:
                self._is_deleted = not wanted
                self._changed.notify_all()

    # What routers and gateways call.

    async def watch(
        self,
        kind: str,
        pid: int,
        node: str,
        known: tuple[int, int],
        timeout_s: float,
        samples: Samples | None = None,
    ) -> dict[str, Any]:
        """Return the placement once it differs from ``known`` (epoch, version).

        The answer is ``{"placement": …, "loop_age_s": …, "is_deleted": …}``: the placement as plain
        data, ``None`` when nothing changed within ``timeout_s`` (at most ``MAX_WATCH_S``), how long
        ago this controller last finished a look at any actor, and whether Serve deletes the
        application. The call also says that this router or gateway is alive, and brings its
        ``samples``.
        """
        self._members.heard(kind, ProcessStatus(pid, node), (known[0], known[1]), samples)
        self._changes.known_to_one_more()
        async with self._changed:
            try:
                async with asyncio.timeout(min(timeout_s, MAX_WATCH_S)):
                    await self._changed.wait_for(
                        lambda: self._is_deleted or self._placement.order != tuple(known)
                    )
                wire = self._placement.to_wire()
            except TimeoutError:
                wire = None
        return {
            "placement": wire,
            "loop_age_s": time.monotonic() - self._looped_s,
            "is_deleted": self._is_deleted,
        }

    async def suspect(self, actor_id: str, generation: int) -> None:
        """Have an actor looked at now, since a router has no answer from this generation.

        While it is said again and again, a heartbeat is waited for less long.
        """
        report = self._reports.get(actor_id)
        if report is not None and report.generation == generation:
            self._suspected_s[actor_id] = time.monotonic()
            self._suspected[actor_id].set()

    async def status(self) -> dict[str, Any]:
        """Return :class:`ClusterStatus` as plain data."""
        return self._status().to_wire()

    async def measurements(self, own: ProcessSamples) -> Measurements:
        """Return all that is measured; ``own`` are the samples of the gateway that asks."""
        self._members.heard(own.kind, own.process, samples=own.samples)
        reports = tuple(report for _, report in sorted(self._reports.items()))
        return Measurements(self._status(), reports, self._members.samples())

    def _status(self) -> ClusterStatus:
        return ClusterStatus(
            models=tuple(experts.model for experts in self._models),
            epoch=self._placement.epoch,
            placement_version=self._placement.version,
            controller_pid=os.getpid(),
            missing_experts=len(self._placement.missing()),
            routers=self._members.of("router"),
            gateways=self._members.of("gateway"),
            actors=tuple(_actor_status(report) for _, report in sorted(self._reports.items())),
            min_copies=self._min_copies,
            live_copies=self._placement.fewest_copies(),
            loading=self._loading.status(),
        )

    async def load(self) -> dict[str, Any]:
        """Return :class:`LoadStatus` as plain data."""
        told = replace(self._rebalancer.load(), changes=tuple(self._elastic.history))
        return told.to_wire()

    async def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """Spread the load of now, or only tell how; see :meth:`Rebalancer.rebalance`.

        Returns ``{"report": …}``, a :class:`RebalanceReport` as plain data, or ``{"error": …}``.
        """
        try:
            return {"report": (await self._rebalancer.rebalance(dry_run)).to_wire()}
        except ExpertMeshError as error:  # Serve would wrap it
            return {"error": error.to_wire()}

    async def scale(self, number: int, pool: str, dry_run: bool) -> dict[str, Any]:
        """Have a pool of so many actors; see :meth:`Elastic.scale`, and below for the answer."""
        return await _told(self._elastic.scale(number, pool, dry_run))

    async def drain(self, target: str, dry_run: bool) -> dict[str, Any]:
        """Empty and end an actor, or those of a node; see :meth:`Elastic.drain`."""
        return await _told(self._elastic.drain(target, dry_run))

    async def set_copies(
        self, model: str, layer: int, expert: int, number: int, dry_run: bool
    ) -> dict[str, Any]:
        """Bring an expert to so many copies; see :meth:`Elastic.set_copies`.

        Returns ``{"report": …}``, a :class:`ChangeReport` as plain data, or ``{"error": …}``.
        """
        key = ExpertKey(model, layer, expert)
        return await _told(self._elastic.set_copies(key, number, dry_run))

    async def close(self) -> None:
        """Stop keeping; end the actors too when Serve is deleting the application.

        On a mere restart or a new configuration they live on for the next controller to adopt.
        """
        for task in (*self._tasks, *self._keepers.values()):
            task.cancel()
        if await asyncio.to_thread(app_is_wanted, self._app):
            return
        for _, _, handle in await asyncio.to_thread(self._pool.find):
            self._pool.kill(handle)
        await asyncio.to_thread(self._pool.ledger.clear)


class _Cluster:
    """A controller as changes see it."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    @property
    def pool(self) -> ExpertPool:
        return self._controller._pool

    @property
    def placement(self) -> Placement:
        return self._controller._placement

    @property
    def reports(self) -> Mapping[str, ActorReport]:
        return self._controller._reports

    @property
    def handles(self) -> Mapping[str, ActorHandle]:
        return self._controller._handles

    async def publish(self, change: Callable[[Placement], Placement]) -> None:
        await self._controller._publish(change)

    async def wait_for(self, condition: Callable[[Placement], bool]) -> None:
        changed = self._controller._changed
        async with changed:
            await changed.wait_for(lambda: condition(self.placement))

    def is_known(self, order: tuple[int, int]) -> bool:
        return self._controller._members.know("router", order)

    def look_at(self, actor_id: str) -> None:
        self._controller._suspected[actor_id].set()

    def begin(self, actor_id: str) -> None:
        self._controller._start_keeping(actor_id)

    def joined(self) -> None:
        self._controller._write_ledger()

    async def end(self, actor_id: str) -> None:
        await self._controller._stop_keeping(actor_id)

    def node_of(self, actor_id: str) -> str | None:
        return self._controller._nodes.get(actor_id)


async def _told(change: Awaitable[ChangeReport]) -> dict[str, Any]:
    """Return a change's report or error as plain data; Serve would wrap what is raised."""
    try:
        return {"report": (await change).to_wire()}
    except ExpertMeshError as error:
        return {"error": error.to_wire()}


def _actor_status(report: ActorReport) -> ActorStatus:
    return ActorStatus(
        actor_id=report.actor_id,
        pid=report.pid,
        node=report.node,
        device=report.device,
        generation=report.generation,
        experts=tuple((k.model, k.layer_id, k.expert_id) for k in report.experts),
        tokens=sum(report.tokens.values()),
        weight_bytes=report.weight_bytes,
    )
