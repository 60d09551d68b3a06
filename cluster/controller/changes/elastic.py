"""More and fewer actors, and copies of an expert, while requests run.

To grow, actors join the fleet, Ray is asked for their devices, and once they are up, experts are
spread over them too. Standby actors are used first. To shrink, a committed change moves an actor's
experts to others, and then the actor ends. After a failure the actor keeps the rest of
its experts, and stays in the fleet. Actors on a draining node get successors elsewhere, and are
drained in the same way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Sequence

from cluster.controller.changes.rebalance import Moved, Rebalancer
from cluster.controller.lifecycle.keeper import Keeper
from cluster.controller.records.pool import ExpertPool
from cluster.controller.records.state import ClusterState
from cluster.errors import ExpertMeshError, InvalidRequestError
from cluster.placement.board import Device
from cluster.placement.drain import change_of_copies, cheapest_to_drain
from cluster.placement.scaling import BusyMeter, wanted_standby
from cluster.reports import ChangeReport
from cluster.spec import ExpertKey, model_id_of

UP_TIMEOUT_S = 60.0
"""How long a change waits for new actors; they may still come later."""
SPREAD_RETRY_S = 1.0
KEPT_REPORTS = 64
MAX_ACTORS = 1000
COMMAND = "asked for"
"""The reason of a change that an operator commanded."""

logger = logging.getLogger("expertmesh.scaling")


class Elastic:
    """Changes the fleet of one application, one change at a time."""

    def __init__(
        self,
        state: ClusterState,
        expert_pool: ExpertPool,
        keeper: Keeper,
        rebalancer: Rebalancer,
        meter: BusyMeter,
    ) -> None:
        """``meter`` restarts when experts have moved, since its measurements are old then."""
        self.history: deque[ChangeReport] = deque(maxlen=KEPT_REPORTS)
        """The last changes, with those that pools in dry run would have made; newest first."""
        self._state = state
        self._fleet = state.fleet
        self._expert_pool = expert_pool
        self._keeper = keeper
        self._rebalancer = rebalancer
        self._meter = meter
        self._expert_bytes = {model.model: model.expert_bytes for model in state.models}
        self.lock = asyncio.Lock()
        self._spread_over: set[tuple[str, int]] = set()
        """Generations of actors that came up empty and have been, or are being, given experts."""
        self._spread_at_s = 0.0
        """When spreading over empty actors may be tried again."""
        self._awaited: set[str] = set()
        """New actors that a change waits for."""

    # What operators command.

    async def scale(
        self, number: int, pool: str = "", dry_run: bool = False, reason: str = COMMAND
    ) -> ChangeReport:
        """Scale a pool to ``number`` actors; returns when experts are spread over them.

        Raises :class:`InvalidRequestError` if the number is out of bounds or the actors' devices
        cannot hold all experts, :class:`UnavailableError` while another actor is away.
        """
        async with self.lock:
            name = self._fleet.pool_named(pool).name
            before = self._fleet.of(name)
            self._check_number(name, number, len(before))
            what = f"{name}: {len(before)} -> {number} actors"
            if number <= len(before):
                leaving = self._cheapest(before, len(before) - number)
                return await self.shrink(leaving, what, dry_run, reason)
            if dry_run:
                return await self._plan_growth(name, number - len(before), what, reason)
            logger.info("%s, %s", what, reason)
            added = await self.grow([name] * (number - len(before)))
        # Without the lock: Ray's autoscaler may take minutes to find devices.
        return await self._use(added, what, reason)

    async def drain(self, actor_id: str, dry_run: bool = False) -> ChangeReport:
        """Drain and end an actor; its experts go to others.

        Raises what :meth:`scale` raises, also if its pool would fall below its bounds.
        """
        async with self.lock:
            pool = self._fleet.pool_of[actor_id]
            actors = self._fleet.of(pool)
            if actor_id in actors:  # not a standby
                self._check_number(pool, len(actors) - 1, len(actors))
            return await self.shrink([actor_id], f"drain {actor_id}", dry_run, COMMAND)

    async def set_copies(
        self, key: ExpertKey, number: int, dry_run: bool = False, of_all: bool = False
    ) -> ChangeReport:
        """Bring an expert to ``number`` copies, which stay until a rebalancing changes them.

        With ``of_all`` it is all experts of the key's model. Raises :class:`InvalidRequestError` if
        there is no such expert, or the number is below ``min_copies`` or more than fit.
        """
        async with self.lock, self._rebalancer.plan_lock:
            began_at_s, model = time.monotonic(), model_id_of(key.model)
            holders = self._state.placement.holders
            keys = [one for one in holders if (one.model == key.model if of_all else one == key)]
            which = "" if of_all else f" layer {key.layer_id} expert {key.expert_id}"
            if not keys:
                where = "" if of_all else f" with expert {key.expert_id} in layer {key.layer_id}"
                raise InvalidRequestError(f"no model {model!r:.80}{where}", "expert")
            devices = self._rebalancer.devices(is_any_room=True)
            least = self._state.min_copies
            if not least <= number <= len(devices):
                raise InvalidRequestError(
                    f"must be from {least} to {len(devices)} (given: {number})", "copies"
                )
            free_bytes = self._rebalancer.free_bytes(devices)
            change = change_of_copies(
                keys,
                number,
                devices,
                self._state.shares,
                free_bytes,
                self._expert_bytes[key.model],
                None if of_all else self._tokens_per_s(),
            )
            moved = Moved("unchanged")
            if change.touched():
                moved = await self._rebalancer.carry_out(
                    change.added, change.dropped, free_bytes, dry_run
                )
            if moved.outcome == "committed":
                self._rebalancer.keep_cold_copies()
            what = f"{model}{which}: {number} copies{' of all experts' if of_all else ''}"
            return self.report(what, COMMAND, moved, began_at_s)

    def _check_number(self, pool: str, number: int, before: int) -> None:
        """Raise :class:`InvalidRequestError` if a pool may not have ``number`` actors."""
        targets = self._fleet.pools[pool].autoscaling
        least, most = (targets.min_actors, targets.max_actors) if targets else (0, MAX_ACTORS)
        others = len(self._fleet.in_use()) - before
        least = max(least, self._state.min_copies - others, 1 - others)
        if not least <= number <= most:
            raise InvalidRequestError(
                f"{pool} must have from {least} to {most} actors (given: {number})", "actors"
            )

    def _cheapest(self, actors: Sequence[str], number: int) -> list[str]:
        return cheapest_to_drain(
            actors,
            number,
            self._state.shares,
            self._expert_bytes,
            self._state.min_copies,
            self._tokens_per_s(),
        )

    def _tokens_per_s(self) -> dict[str, float]:
        loads = self._rebalancer.tracker.devices(time.monotonic())
        return {actor_id: load.tokens_per_s for actor_id, load in loads.items()}

    # Growing and shrinking.

    async def _plan_growth(self, pool: str, number: int, what: str, reason: str) -> ChangeReport:
        began_at_s = time.monotonic()
        coming = self.coming([pool] * number)
        async with self._rebalancer.plan_lock:
            moved = await self._rebalancer.spread(coming=coming, dry_run=True)
        added = [device.actor_id for device in coming]
        return self.report(what, reason, moved, began_at_s, added)

    def coming(self, pools: Sequence[str]) -> list[Device]:
        """Return a device for a new actor of each of the pools, for a dry run."""
        return [
            Device(f"{pool}-new-{i}", f"new-{i}", self._rebalancer.room_bytes(pool))
            for i, pool in enumerate(pools)
        ]

    async def grow(self, pools: Sequence[str], avoided_nodes: Collection[str] = ()) -> list[str]:
        """Add an actor to each of the pools: a standby actor that is up, or else a new one.

        A standby actor on one of ``avoided_nodes`` is not taken.
        """
        return [
            await self._take_standby(pool, avoided_nodes) or self._start(pool) for pool in pools
        ]

    async def _take_standby(self, pool: str, avoided_nodes: Collection[str]) -> str | None:
        for actor_id in self._fleet.standby_of(pool):
            is_up = actor_id in self._state.placement.generations
            if is_up and self._state.nodes.get(actor_id) not in avoided_nodes:
                self._fleet.take_into_use(actor_id)
                await self._state.try_record(f"that {actor_id} is in use")
                return actor_id
        return None

    def _start(self, pool: str, is_standby: bool = False) -> str:
        actor_id = self._fleet.add(pool, is_standby)
        self._state.shares[actor_id] = []
        self._keeper.start(actor_id)
        return actor_id

    async def _use(self, added: Sequence[str], what: str, reason: str) -> ChangeReport:
        """Spread experts over the added actors, as far as they come up in time."""
        began_at_s = time.monotonic()
        self._awaited |= set(added)
        try:
            await self.wait_up(added, UP_TIMEOUT_S)
            async with self.lock:
                up = [a for a in added if a in self._state.placement.generations]
                moved = await self._spread_over_empty(up) if up else Moved("committed")
        finally:
            self._awaited -= set(added)
        away = [a for a in added if a not in up and a in self._fleet.specs]
        if away and moved.outcome == "committed":
            why = await asyncio.to_thread(self._expert_pool.shortage, self._fleet.specs[away[0]])
            moved = Moved(f"pending: {', '.join(away)}: {why}", moved.moves, moved.moved_bytes)
        return self.report(what, reason, moved, began_at_s, added)

    async def wait_up(self, actor_ids: Sequence[str], timeout_s: float) -> list[str]:
        """Wait for actors to come up; returns those that are up in time."""
        wanted = set(actor_ids)
        try:
            async with asyncio.timeout(timeout_s):
                await self._state.wait_for(
                    lambda: wanted <= self._state.placement.generations.keys()
                )
        except TimeoutError:
            pass
        return [a for a in actor_ids if a in self._state.placement.generations]

    async def _spread_over_empty(self, empty: Sequence[str]) -> Moved:
        """Spread experts over actors that are up and hold none; a failure is retried later."""
        generations = self._state.placement.generations
        tried = {(actor_id, generations[actor_id]) for actor_id in empty}
        self._spread_over |= tried
        try:
            async with self._rebalancer.plan_lock:
                moved = await self._rebalancer.spread()
        except ExpertMeshError as error:
            moved = Moved(f"failed: {error}")
        if moved.outcome != "committed":
            self._spread_over -= tried
            self._spread_at_s = time.monotonic() + SPREAD_RETRY_S
        self._meter.restart()
        return moved

    def note_spread(self, up: Sequence[str]) -> None:
        """Note actors that a change gives experts, so that :meth:`use_empty` leaves them alone."""
        generations = self._state.placement.generations
        self._spread_over |= {(a, generations[a]) for a in up if a in generations}

    async def shrink(
        self,
        leaving: Sequence[str],
        what: str,
        dry_run: bool,
        reason: str,
        coming: Sequence[Device] = (),
    ) -> ChangeReport:
        """Move the experts of leaving actors to the others, and end those actors.

        ``coming`` devices are only for a dry run. The caller holds :attr:`lock`.
        """
        began_at_s = time.monotonic()
        if not leaving:
            return self.report(what, reason, Moved("unchanged"), began_at_s)
        if not dry_run:
            logger.info("%s, %s: draining %s", what, reason, ", ".join(leaving))
        async with self._rebalancer.plan_lock:
            moved = await self._rebalancer.spread(leaving, coming, dry_run)
            if moved.outcome == "committed":
                for actor_id in leaving:
                    self._meter.leave(actor_id, self._fleet.pool_of[actor_id])
                    await self._keeper.stop(actor_id)
        removed = () if moved.outcome.startswith("failed") else leaving
        return self.report(what, reason, moved, began_at_s, removed=removed)

    def report(
        self,
        what: str,
        reason: str,
        moved: Moved,
        began_at_s: float,
        added: Sequence[str] = (),
        removed: Sequence[str] = (),
    ) -> ChangeReport:
        """Return the report of a change, after logging it and keeping it in the history."""
        placement = self._state.placement
        report = ChangeReport(
            what=what,
            reason=reason,
            outcome=moved.outcome,
            added=tuple(added),
            removed=tuple(removed),
            moves=moved.moves,
            moved_bytes=moved.moved_bytes,
            at_s=time.time(),
            took_s=time.monotonic() - began_at_s,
            epoch=placement.epoch,
            version=placement.version,
        )
        logger.info("%s, %s: %s after %.1f s", what, reason, report.outcome, report.took_s)
        if report.outcome not in ("planned", "unchanged"):
            self.history.appendleft(report)
        return report

    # What happens automatically.

    async def use_empty(self) -> None:
        """Spread experts over actors that came up after their change had timed out."""
        generations = self._state.placement.generations
        empty = [
            actor_id
            for actor_id, share in self._state.shares.items()
            if not share
            and actor_id in generations
            and actor_id not in self._awaited
            and actor_id not in self._fleet.standby
            and (actor_id, generations[actor_id]) not in self._spread_over
        ]
        began_at_s = time.monotonic()
        if not empty or self.lock.locked() or began_at_s < self._spread_at_s:
            return
        async with self.lock:
            moved = await self._spread_over_empty(empty)
            if moved.outcome == "committed":
                self.report(f"{', '.join(empty)} came up", "waited for", moved, began_at_s, empty)

    async def keep_standby(self) -> None:
        """Start and end standby actors to the number that each pool wants.

        A process takes seconds to start, and a machine minutes; a standby actor needs only its
        experts. Waits until all experts have a copy.
        """
        if self.lock.locked() or self._state.placement.missing():
            return
        async with self.lock:
            for name, pool in self._fleet.pools.items():
                standing = self._fleet.standby_of(name)
                wanted = 0
                if pool.autoscaling is not None:
                    wanted = wanted_standby(pool.autoscaling, len(self._fleet.of(name)))
                for _ in range(wanted - len(standing)):
                    logger.info("%s starts as a standby", self._start(name, is_standby=True))
                for actor_id in standing[wanted:]:
                    await self._keeper.stop(actor_id)
