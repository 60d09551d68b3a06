"""Changes of who holds what, one at a time and all or nothing, while requests run.

A change is prepared (its copies are loaded where they are to be), committed (one new version of the
placement has the new copies and lacks the old ones) and then retired: what nobody is to hold any
more is let go, once every router has said that it knows that version or has not been heard of for
long. Where a step before the commit fails nothing has changed, and what was loaded is let go.

Retiring goes by what is: an actor lets go whatever it holds beyond its share. So it does not matter
who failed when, and a next controller finishes what this one began.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from cluster.controller.pool import cause_of, kind_of
from cluster.controller.state import Cluster
from cluster.errors import ExpertMeshError, UnavailableError
from cluster.placement.change import Change, Shares, refuse_losses, with_change
from cluster.placement.placement import Placement, surplus
from cluster.spec import ActorReport, ExpertKey

LOAD_TIMEOUT_S = 600.0
UNLOAD_TIMEOUT_S = 30.0
RETIRE_TIMEOUT_S = 60.0
"""How long a change waits for what it has dropped to be let go; routers may be silent so long."""


logger = logging.getLogger("expertmesh.controller")


class Changes:
    """Applies changes, and has actors let go what they need not hold."""

    def __init__(self, cluster: Cluster, shares: Shares, min_copies: int) -> None:
        """``shares`` has what each actor is to hold until the first change."""
        self.shares = shares
        self._cluster = cluster
        self._min_copies = min_copies
        self._one_at_a_time = asyncio.Lock()
        self._pending: Mapping[str, Sequence[ExpertKey]] = {}
        self._left: dict[str, tuple[int, int]] = {}
        """The placement in which each actor was given up for some experts that it still holds."""
        self._let_go = asyncio.Event()

    async def apply(self, change: Change) -> None:
        """Make a change; returns when it is committed and what it drops has been let go.

        Raises :class:`UnavailableError` where it is refused or a step failed; then nothing has
        changed. What is let go late is let go all the same.
        """
        async with self._one_at_a_time:
            generations = self._check(change)
            self._pending = change.added
            try:
                await self._prepare(change)
                await self._cluster.publish(lambda now: self._commit(now, change, generations))
            finally:
                self._pending = {}
                for actor_id in (*change.added, *change.dropped):
                    self._cluster.look_at(actor_id)
            await self._wait_let_go(change)

    def _check(self, change: Change) -> dict[str, int]:
        """Return the generations that are to load; refuses what would lose an expert."""
        placement, after = self._cluster.placement, change.on(self.shares)
        generations = {}
        for actor_id in change.added:
            if actor_id not in placement.generations or actor_id not in self._cluster.handles:
                raise UnavailableError(f"{actor_id} is not there now", "", 1.0)
            generations[actor_id] = placement.generations[actor_id]
        copies = dict.fromkeys(change.touched(), 0)
        for keys in after.values():
            for key in copies.keys() & keys:
                copies[key] += 1
        for key, count in copies.items():
            if count < self._min_copies:
                raise UnavailableError(
                    f"refused: expert {key.expert_id} of layer {key.layer_id} would have {count} "
                    f"copies, and is to have at least {self._min_copies}",
                    key.model,
                )
        refuse_losses(with_change(placement, change), change)
        return generations

    async def _prepare(self, change: Change) -> None:
        """Load what is to come; all or nothing."""
        epoch = self._cluster.placement.epoch

        async def load(actor_id: str, keys: Sequence[ExpertKey]) -> None:
            handle = self._cluster.handles[actor_id]
            loaded = self._cluster.pool.load(handle, epoch, keys, LOAD_TIMEOUT_S)
            await _said(actor_id, "load", loaded)

        loads = [load(actor_id, keys) for actor_id, keys in change.added.items()]
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _commit(
        self, placement: Placement, change: Change, generations: Mapping[str, int]
    ) -> Placement:
        """Return the placement after a change, if those who loaded still live."""
        for actor_id, generation in generations.items():
            if placement.generations.get(actor_id) != generation:
                raise UnavailableError(f"{actor_id} died before the change was made", "", 1.0)
        after = with_change(placement, change)
        refuse_losses(after, change)
        # With the map, so that whoever is brought up from now on gets the new share.
        self.shares.update(change.on(self.shares))
        self._left |= dict.fromkeys(change.dropped, after.order)
        return after

    async def _wait_let_go(self, change: Change) -> None:
        try:
            async with asyncio.timeout(RETIRE_TIMEOUT_S):
                while self._is_held(change):
                    self._let_go.clear()
                    await self._let_go.wait()
        except TimeoutError:
            logger.warning("what a change dropped is not let go after %.0f s", RETIRE_TIMEOUT_S)

    def _is_held(self, change: Change) -> bool:
        reports = self._cluster.reports
        return any(
            actor_id in reports and not set(keys).isdisjoint(reports[actor_id].experts)
            for actor_id, keys in change.dropped.items()
        )

    # Letting go, at every look at an actor.

    async def retire(
        self, actor_id: str, handle: ActorHandle, report: ActorReport
    ) -> ActorReport | None:
        """Have an actor let go what it holds beyond its share, once those who are to hold it do.

        First it leaves the map, then, once all routers know that, the actor's memory. Returns the
        actor's new report, or ``None`` where nothing was let go. Raises what the actor raises.
        """
        beyond = set(report.experts).difference(
            self.shares[actor_id], self._pending.get(actor_id, ())
        )
        if not beyond:
            self._left.pop(actor_id, None)
            return None
        in_map = {key for key in beyond if actor_id in self._cluster.placement.holders[key]}
        if surplus(self._cluster.placement, self.shares, in_map):
            await self._cluster.publish(
                lambda now: with_change(
                    now, Change({}, {actor_id: surplus(now, self.shares, in_map)})
                )
            )
            self._left[actor_id] = self._cluster.placement.order
        placement = self._cluster.placement
        gone = sorted(key for key in beyond if actor_id not in placement.holders[key])
        if not gone or not self._cluster.is_known(self._left.get(actor_id, (-1, -1))):
            return None
        try:
            after = await self._cluster.pool.unload(handle, placement.epoch, gone, UNLOAD_TIMEOUT_S)
        except RayTaskError as error:
            raise cause_of(error) from None
        logger.info("%s lets %d experts go", actor_id, len(gone))
        return after

    def forget(self, actor_id: str) -> None:
        """Take out an actor that is to hold nothing any more."""
        self.shares.pop(actor_id, None)
        self._left.pop(actor_id, None)

    def looked_at(self) -> None:
        """Wake a change that waits for what it dropped; an actor has reported or is gone."""
        self._let_go.set()

    def known_to_one_more(self) -> None:
        """Look at those who wait for routers to know that they are not asked any more."""
        for actor_id in tuple(self._left):
            self._cluster.look_at(actor_id)


async def _said(actor_id: str, what: str, answer: Awaitable[ActorReport]) -> ActorReport:
    """Wait for an actor; raises :class:`UnavailableError` that says what failed."""
    try:
        return await answer
    except (RayActorError, RayTaskError, TimeoutError, OSError, ExpertMeshError) as error:
        cause = cause_of(error) if isinstance(error, RayTaskError) else error
        told = str(cause) if isinstance(cause, ExpertMeshError) else kind_of(cause)
        raise UnavailableError(f"{actor_id} did not {what}: {told}", "", 1.0) from None
