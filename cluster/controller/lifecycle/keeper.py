"""Keeps expert actors alive: one task per actor creates it, makes it load, and sends it heartbeats.

On death the task publishes the loss and creates the next generation. Actors are detached: they
outlive a controller, and the next one adopts them under a higher epoch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.health.deaths import BrokenActorError, Death, Deaths
from cluster.controller.health.liveness import LOOK_S, Progress, Silence
from cluster.controller.health.suspicion import Suspicion
from cluster.controller.lifecycle.loading import Loading
from cluster.controller.lifecycle.processes import ActorProcesses
from cluster.controller.records.changes import LOAD_TIMEOUT_S, UNLOAD_TIMEOUT_S, Retirement
from cluster.controller.records.members import Members
from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.controller.records.state import ClusterState
from cluster.errors import (
    CheckpointError,
    ExpertMeshError,
    NoRoomError,
    StaleEpochError,
    UnavailableError,
)
from cluster.spec import ActorReport

HEARTBEAT_PERIOD_S = 1.0
LOAD_PERIOD_S = 0.25
"""Time between an actor's heartbeats if the number of copies or actors follows the load."""
MAX_HEARTBEATS_PER_S = 400
"""The most heartbeats a second of all actors together; many actors get a longer period."""
PLACE_NOTICE_S = 10.0
LOAD_RETRY_S = 5.0
"""How long a serving actor waits after a failed load before it retries."""

logger = logging.getLogger("expertmesh.controller")


class Observer(Protocol):
    """Measures something from the reports of all actors."""

    def observe(self, report: ActorReport, now_s: float) -> None:
        """Take an actor's report."""

    def forget(self, actor_id: str) -> None:
        """Drop an actor that is dead or gone."""


class Keeper:
    """Keeps the actors of one application alive, each by a task of its own."""

    def __init__(
        self,
        state: ClusterState,
        expert_pool: ExpertPool,
        retirement: Retirement,
        observers: Sequence[Observer],
        rebalance_period_s: float | None,
        members: Members,
    ) -> None:
        """``observers`` get every report; ``members`` knows the routers.

        Heartbeats come every :data:`HEARTBEAT_PERIOD_S`, or more often if copies or actors follow
        the load, so that each decision has new counters.
        """
        self.loading = Loading()
        self.deaths = Deaths()
        self.processes = ActorProcesses(state, expert_pool, self.deaths)
        self.relieve: Callable[[str, NoRoomError], Awaitable[bool]] = keep_experts
        """Moves experts off an actor whose memory has no room for them; returns whether it did."""
        self.relieve_waiting: Callable[[str, str], Awaitable[object]] = keep_experts
        """Moves experts that nobody holds off an actor that waits for resources."""
        self.looped_at_s = time.monotonic()
        """When any task last finished a step; old if this controller hangs."""
        self._state = state
        self._expert_pool = expert_pool
        self._retirement = retirement
        self._observers = observers
        self.suspicion = Suspicion(state, members, self.heartbeat_now)
        self._load_period_s: float | None = None
        if rebalance_period_s is not None:
            self._load_period_s = min(LOAD_PERIOD_S, rebalance_period_s)
        elif any(pool.autoscaling for pool in state.fleet.pools.values()):
            self._load_period_s = LOAD_PERIOD_S
        self._load_again_at_s: dict[str, float] = {}
        """When each actor that could not load its whole share retries."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._heartbeat_due: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    # What other parts call.

    def start(
        self, actor_id: str, handle: ActorHandle | None = None, is_silent: bool = False
    ) -> None:
        """Begin to keep an actor of the fleet, with its handle if it is already running.

        An actor that ``is_silent`` has not answered yet.
        """
        keeping = self._keep(actor_id, handle, is_silent)
        self._tasks[actor_id] = asyncio.create_task(keeping, name=f"keep {actor_id}")

    async def stop(self, actor_id: str) -> None:
        """End an actor that should hold nothing any more, and take it out of the fleet."""
        self._state.fleet.remove(actor_id)
        await self._state.try_record(f"that {actor_id} left")
        await self._state.leave_placement(actor_id)
        task = self._tasks.pop(actor_id)
        task.cancel()
        await asyncio.wait([task])
        await self._state.leave_placement(actor_id)  # it may have come up until a moment ago
        self._forget(actor_id)
        self.suspicion.forget(actor_id)
        self._state.remove(actor_id)
        self._retirement.forget(actor_id)
        self.deaths.forget(actor_id)
        self._load_again_at_s.pop(actor_id, None)
        self._heartbeat_due.pop(actor_id, None)

    def heartbeat_now(self, actor_id: str) -> None:
        """Send an actor its next heartbeat at once."""
        self._heartbeat_due[actor_id].set()

    def suspect(self, actor_id: str, generation: int, hears_others: bool) -> None:
        """Check an actor at once, since a router has no answer from this generation.

        While the router repeats its suspicion, an unanswered heartbeat counts as a death sooner.
        ``hears_others`` says that the router hears other actors.
        """
        if self._state.placement.generations.get(actor_id) == generation:
            self.suspicion.suspect(actor_id, hears_others)
            self.heartbeat_now(actor_id)

    def close(self) -> None:
        """Stop keeping; the actors keep running."""
        for task in self._tasks.values():
            if task is not asyncio.current_task():  # which ends by itself
                task.cancel()

    # The life of one actor.

    async def _keep(self, actor_id: str, handle: ActorHandle | None, is_silent: bool) -> None:
        while True:
            self.looped_at_s = time.monotonic()
            is_broken = False
            try:
                handle = handle or await self.processes.create_away(actor_id)
                self.deaths.begin(actor_id, time.monotonic())
                if is_silent:
                    await self._hear(actor_id, handle)
                    is_silent = False
                await self._bring_up(actor_id, handle)
                await self._watch(actor_id, handle)
                continue  # it loads experts again
            except StaleEpochError:
                self._state.supersede()
                return
            except BrokenActorError as error:
                is_broken, death = True, Death(str(error), is_of_place=True)
                logger.error("%s is broken: %s; replacing it", actor_id, error)
            except (RayActorError, RayTaskError, TimeoutError) as error:
                death = Death(_reason_of(error), is_of_place=True)
                logger.warning("%s: %s; replacing it", actor_id, death.reason)
            except ExpertMeshError as error:
                death = _death_of(error)
                logger.error("%s: %s", actor_id, error)
            except asyncio.CancelledError:
                self._kill_removed(actor_id, handle)
                raise
            except Exception as error:
                death = Death(kind_of(error))
                logger.exception("%s: unexpected failure; trying again", actor_id)
            is_silent = False
            self._forget(actor_id)
            self._retirement.wake()
            await self._state.leave_placement(actor_id)
            self.suspicion.forget(actor_id)
            try:
                death = await self.processes.said(actor_id) or death
                delay_s = self.deaths.ended(actor_id, death, time.monotonic())
                # A broken actor holds its device until then, so that the successor gets another.
                successor = await self.processes.create_beside(actor_id) if is_broken else None
                if handle is not None and not await self.processes.end(handle):
                    return
                handle = successor
                await asyncio.sleep(delay_s)
            except asyncio.CancelledError:
                self._kill_removed(actor_id, handle)
                raise

    def _kill_removed(self, actor_id: str, handle: ActorHandle | None) -> None:
        """End an actor that was taken out of the fleet."""
        if actor_id not in self._state.fleet.specs and handle is not None:
            self._expert_pool.kill(handle)

    async def _hear(self, actor_id: str, handle: ActorHandle) -> None:
        """Wait for the first answer of an adopted actor.

        Raises :class:`UnavailableError` if its process has a different configuration, and
        ``TimeoutError`` if it hangs.
        """
        report = await self._heartbeat(actor_id, handle)
        if report.digest != self._state.fleet.specs[actor_id].digest:
            raise UnavailableError("has a different configuration; ending it", actor_id)

    def _forget(self, actor_id: str) -> None:
        self._state.forget(actor_id)
        for observer in self._observers:
            observer.forget(actor_id)

    async def _bring_up(self, actor_id: str, handle: ActorHandle) -> None:
        """Make an actor load its share, and publish it."""
        started_at_s = time.monotonic()
        epoch = self._state.placement.epoch
        waiting = asyncio.create_task(self._say_why_it_waits(actor_id, handle))
        following = asyncio.create_task(self._follow_loading(handle))
        try:
            if withdrawn := self._state.withdrawn.pop(actor_id, ()):  # room for the new experts
                await self._expert_pool.unload(handle, epoch, withdrawn, UNLOAD_TIMEOUT_S)
                logger.info("%s unloaded %d experts of a previous model", actor_id, len(withdrawn))
            report = await self._load(actor_id, handle)
        finally:
            waiting.cancel()
            following.cancel()
            self.loading.end(actor_id)
        self.deaths.came_up(report, time.monotonic())
        await self._state.add(actor_id, handle, report)
        logger.info(
            "%s g%d on %s holds %d experts, pid %d, %.1f s%s",
            actor_id,
            report.generation,
            report.device,
            len(report.experts),
            report.pid,
            time.monotonic() - started_at_s,
            report.fetched(),
        )

    async def _load(self, actor_id: str, handle: ActorHandle) -> ActorReport:
        """Make an actor load its share.

        If it cannot load all of it, an actor that holds experts serves those, and tries again
        later.
        """
        self._load_again_at_s.pop(actor_id, None)
        try:
            return await self._load_share(actor_id, handle)
        except (NoRoomError, CheckpointError) as error:
            report = await self._expert_pool.describe(handle, PLACE_NOTICE_S)
            if not report.experts:
                raise
            logger.error("%s serves only %d experts: %s", actor_id, len(report.experts), error)
            self.deaths.lacks_experts(actor_id, _death_of(error))
            self._load_again_at_s[actor_id] = time.monotonic() + LOAD_RETRY_S
            return report

    async def _load_share(self, actor_id: str, handle: ActorHandle) -> ActorReport:
        """Make an actor load its share, or less if other actors take experts it has no room for."""
        for is_last in (False, True):
            spec, keys = self._state.fleet.specs[actor_id], self._state.shares[actor_id]
            self.loading.begin(actor_id, len(keys), time.monotonic())
            epoch = self._state.placement.epoch
            try:
                return await self._expert_pool.load(handle, epoch, spec, keys, LOAD_TIMEOUT_S)
            except NoRoomError as error:
                self.deaths.located(await self._expert_pool.describe(handle, PLACE_NOTICE_S))
                if is_last or not await self.relieve(actor_id, error):
                    raise
        raise AssertionError("the last load neither returned nor raised")

    async def _say_why_it_waits(self, actor_id: str, handle: ActorHandle) -> None:
        """Log which resources an actor waits for that Ray has not started; Ray does not say.

        An actor that waits for one particular node is ended; its successor may start anywhere.
        """
        for notices in itertools.count():
            await asyncio.sleep(PLACE_NOTICE_S * 2 ** min(notices, 5))
            try:
                await self._expert_pool.describe(handle, PLACE_NOTICE_S)
                return  # it has started, and loads
            except (RayActorError, RayTaskError):
                return
            except TimeoutError:
                spec = self._state.fleet.specs[actor_id]
                why = await asyncio.to_thread(self._expert_pool.shortage, spec)
                logger.warning("%s waits for resources: %s", actor_id, why)
                if self.processes.is_pinned(actor_id):
                    self._state.nodes.pop(actor_id, None)
                    await self.processes.end(handle)
                    return
                if self._state.has_lived(actor_id):  # else its resources may be on their way
                    await self.relieve_waiting(actor_id, why)

    async def _follow_loading(self, handle: ActorHandle) -> None:
        """Poll an actor for how much of its share is loaded, and log the progress."""
        while True:
            try:
                report = await self._expert_pool.describe(handle, PLACE_NOTICE_S)
                self.deaths.located(report)
                self.loading.update(report)
            except (RayActorError, RayTaskError, TimeoutError):
                pass  # it has not started, or died; the load call notices that
            if (line := self.loading.notice(time.monotonic())) is not None:
                logger.info("loading: %s", line)
            await asyncio.sleep(HEARTBEAT_PERIOD_S)

    async def _watch(self, actor_id: str, handle: ActorHandle) -> None:
        """Send heartbeats until the actor must load experts.

        Either it lacks some that the placement says it holds, and routers then stop asking it for
        them; or its last load failed a while ago. Raises ``TimeoutError`` when the actor hangs.
        """
        due = self._heartbeat_due[actor_id]
        progress = Progress(time.monotonic())
        while True:
            due.clear()
            before = self._state.placement
            report = await self._heartbeat(actor_id, handle)
            self.looped_at_s = now_s = time.monotonic()
            self._state.note(report)
            for observer in self._observers:
                observer.observe(report, now_s)
            self.deaths.observe(report, now_s)
            if self.deaths.is_broken(actor_id):
                raise BrokenActorError(report.failure)
            if progress.is_hung(report.steps, report.queued_rows, now_s):
                raise TimeoutError("rows are waiting and none are being computed")
            # A report may be older than a change that was made in the meantime.
            lacking = self._state.lacking(actor_id, report)
            if lacking and before is self._state.placement:
                logger.error("%s lacks %d of its experts; reloading them", actor_id, len(lacking))
                await self._state.correct(actor_id, lacking)
                return
            await self._retirement.retire(actor_id, handle, report)
            if now_s >= self._load_again_at_s.get(actor_id, math.inf):
                return
            try:
                async with asyncio.timeout(self._heartbeat_period_s()):
                    await due.wait()
            except TimeoutError:
                continue

    def _heartbeat_period_s(self) -> float:
        if self._load_period_s is None:
            return HEARTBEAT_PERIOD_S
        shortest_s = len(self._state.fleet.specs) / MAX_HEARTBEATS_PER_S
        return min(HEARTBEAT_PERIOD_S, max(self._load_period_s, shortest_s))

    async def _heartbeat(self, actor_id: str, handle: ActorHandle) -> ActorReport:
        """Return an actor's report; raises ``TimeoutError`` when it does not answer."""
        answer = asyncio.ensure_future(
            self._expert_pool.heartbeat(handle, self._state.placement.epoch)
        )
        silence = Silence(time.monotonic())
        try:
            while not (await asyncio.wait([answer], timeout=LOOK_S))[0]:
                now_s = time.monotonic()
                silence.look(now_s)
                is_lost = await self.suspicion.is_lost(actor_id, silence, now_s)
                if is_lost and not answer.done():
                    raise TimeoutError("it answers no heartbeat")
            report = answer.result()
        finally:
            answer.cancel()
        self.suspicion.answered(actor_id)
        return report


async def keep_experts(actor_id: str, reason: object) -> bool:
    """Move nothing."""
    return False


def _death_of(error: ExpertMeshError) -> Death:
    if isinstance(error, NoRoomError):
        return Death(str(error), True, error.needed_bytes, error.missing_bytes)
    return Death(str(error))


def _reason_of(error: BaseException) -> str:
    """Say why an actor is replaced."""
    if isinstance(error, TimeoutError):
        return "does not answer"
    return "died" if isinstance(error, RayActorError) else kind_of(error)
