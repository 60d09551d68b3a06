"""Changes of the placement, one at a time and all or nothing, while requests run.

A change is prepared (the new copies are loaded), committed (one new placement version adds
the new copies and lacks the dropped ones) and retired (the dropped copies leave their actors'
memory). A copy is retired once every router knows that version or has been silent for long. A
failure before the commit changes nothing; copies loaded by then are retired.

Retirement compares an actor's experts with its share. So no failure leaves anything to undo: the
next heartbeat, perhaps of the next controller, finishes the retirement.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from ray.actor import ActorHandle

from cluster.controller.records.members import Members
from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.controller.records.state import ClusterState
from cluster.errors import ExpertMeshError, UnavailableError
from cluster.placement.change import Change, refuse_losses, with_change
from cluster.placement.placement import Placement, surplus
from cluster.spec import ActorReport, ExpertKey, model_id_of

LOAD_TIMEOUT_S = 600.0
UNLOAD_TIMEOUT_S = 30.0
RETIRE_TIMEOUT_S = 60.0
"""How long a change waits until reports show it; a silent router delays a dropped copy's end."""

logger = logging.getLogger("expertmesh.controller")


class Retirement:
    """Makes actors unload experts outside their shares; called at every heartbeat."""

    def __init__(self, state: ClusterState, expert_pool: ExpertPool, members: Members) -> None:
        """``members`` knows which placement each router has."""
        self.prepared: Mapping[str, Sequence[ExpertKey]] = {}
        """Copies, by actor, that a change loads and that are in no share yet."""
        self._state = state
        self._expert_pool = expert_pool
        self._members = members
        self._left_in: dict[str, tuple[int, int]] = {}
        """The placement that all routers must know before an actor unloads."""
        self._woken = asyncio.Event()

    async def retire(self, actor_id: str, handle: ActorHandle, report: ActorReport) -> None:
        """Make an actor unload experts outside its share, once no router asks it for them.

        The copies first leave the placement, as soon as all actors that should hold the experts do;
        then, once all routers know that placement, the actor's memory. Raises what the actor
        raises.
        """
        self._woken.set()
        share, prepared = self._state.shares[actor_id], self.prepared.get(actor_id, ())
        beyond = set(report.experts).difference(share, prepared)
        beyond = {key for key in beyond if key.model not in self._state.retained}
        if not beyond:
            self._left_in.pop(actor_id, None)
            return
        shares, holders = self._state.shares, self._state.placement.holders
        placed = {key for key in beyond if actor_id in holders.get(key, ())}
        if surplus(self._state.placement, shares, placed):
            await self._state.publish(
                lambda now: with_change(now, Change({}, {actor_id: surplus(now, shares, placed)}))
            )
            self._left_in[actor_id] = self._state.placement.order
        placement = self._state.placement
        gone = sorted(key for key in beyond if actor_id not in placement.holders.get(key, ()))
        if not gone or not self._members.all_know("router", self._left_in.get(actor_id, (-1, -1))):
            return
        after = await self._expert_pool.unload(handle, placement.epoch, gone, UNLOAD_TIMEOUT_S)
        logger.info("%s unloaded %d experts", actor_id, len(gone))
        self._state.note(after)
        self._woken.set()

    def begin(self, actor_ids: Iterable[str], order: tuple[int, int]) -> None:
        """Note that copies of these actors left the placement in the version ``order``."""
        self._left_in |= dict.fromkeys(actor_ids, order)

    def waiting(self) -> tuple[str, ...]:
        """Return the actors that wait until routers know a placement."""
        return tuple(self._left_in)

    def forget(self, actor_id: str) -> None:
        """Drop an actor that left the fleet."""
        self._left_in.pop(actor_id, None)

    def wake(self) -> None:
        """Make :meth:`shown` check again, since an actor is gone."""
        self._woken.set()

    async def shown(self, change: Change) -> None:
        """Wait until the reports of all living actors show a change; on a timeout, warn."""
        try:
            async with asyncio.timeout(RETIRE_TIMEOUT_S):
                while not self._is_shown(change):
                    self._woken.clear()
                    await self._woken.wait()
        except TimeoutError:
            logger.warning("actors did not report a change within %.0f s", RETIRE_TIMEOUT_S)

    def _is_shown(self, change: Change) -> bool:
        """Return whether no report has a dropped copy or lacks an added copy of its share."""
        for actor_id in {*change.added, *change.dropped} & self._state.reports.keys():
            held = set(self._state.reports[actor_id].experts)
            share = self._state.shares.get(actor_id, ())
            coming = set(change.added.get(actor_id, ())).intersection(share)
            if not coming <= held or not held.isdisjoint(change.dropped.get(actor_id, ())):
                return False
        return True


class Changes:
    """Makes changes of the placement."""

    def __init__(
        self,
        state: ClusterState,
        expert_pool: ExpertPool,
        retirement: Retirement,
        heartbeat_now: Callable[[str], None],
    ) -> None:
        """``heartbeat_now`` sends an actor a heartbeat, which retires its copies."""
        self._state = state
        self._expert_pool = expert_pool
        self._retirement = retirement
        self._heartbeat_now = heartbeat_now
        self._lock = asyncio.Lock()

    async def apply(self, change: Change) -> None:
        """Make a change; returns when it is committed and the actors' reports show it.

        So from then on status shows the added copies, and the dropped ones are out of memory.
        Raises :class:`UnavailableError` if it is refused or a step failed; then nothing has
        changed. A retirement that takes long continues after the return.
        """
        async with self._lock:
            generations = self._check(change)
            self._retirement.prepared = change.added
            try:
                await self._prepare(change)
                await self._state.publish(lambda now: self._commit(now, change, generations))
            finally:
                self._retirement.prepared = {}
                for actor_id in (*change.added, *change.dropped):
                    self._heartbeat_now(actor_id)
            await self._retirement.shown(change)

    def _check(self, change: Change) -> dict[str, int]:
        """Return the generations of the actors that load; raises if an expert would be lost."""
        placement, after = self._state.placement, change.on(self._state.shares)
        generations = {}
        for actor_id in change.added:
            if actor_id not in placement.generations or actor_id not in self._state.handles:
                raise UnavailableError(f"{actor_id} is not running", "", 1.0)
            generations[actor_id] = placement.generations[actor_id]
        copies = dict.fromkeys(change.touched(), 0)
        for keys in after.values():
            for key in copies.keys() & keys:
                copies[key] += 1
        for key, count in copies.items():
            if count < self._state.min_copies:
                raise UnavailableError(
                    f"refused: expert {key.expert_id} of layer {key.layer_id} would have {count} "
                    f"copies, fewer than min_copies ({self._state.min_copies})",
                    model_id_of(key.model),
                )
        refuse_losses(placement, with_change(placement, change), change, self._state.min_copies)
        return generations

    async def _prepare(self, change: Change) -> None:
        """Load the added copies; raises the first failure once all loads have ended."""
        handles = self._state.handles
        loads = [self._load(a, handles[a], keys) for a, keys in change.added.items()]
        for outcome in await asyncio.gather(*loads, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _load(self, actor_id: str, handle: ActorHandle, keys: Sequence[ExpertKey]) -> None:
        try:
            epoch, spec = self._state.placement.epoch, self._state.fleet.specs[actor_id]
            report = await self._expert_pool.load(handle, epoch, spec, keys, LOAD_TIMEOUT_S)
            self._state.kernels.note(report)  # before routers learn that it has them
        except Exception as error:  # of any kind: the change fails, and its caller continues
            reason = str(error) if isinstance(error, ExpertMeshError) else kind_of(error)
            raise UnavailableError(f"{actor_id} did not load: {reason}", "", 1.0) from error

    def _commit(
        self, placement: Placement, change: Change, generations: Mapping[str, int]
    ) -> Placement:
        """Return the placement after a change; raises if actors that it relies on have died."""
        for actor_id, generation in generations.items():
            if placement.generations.get(actor_id) != generation:
                raise UnavailableError(f"{actor_id} died before the change was committed", "", 1.0)
        after = with_change(placement, change)
        refuse_losses(placement, after, change, self._state.min_copies)
        # In the same step as the placement, so that an actor that starts now gets its new share.
        self._state.shares.update(change.on(self._state.shares))
        self._retirement.begin(change.dropped, after.order)
        return after
