"""Relief of actors that cannot hold their experts: other actors take some of them.

The actor's memory has no room for them, or it waits for resources while nobody holds them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from cluster.controller.changes.rebalance import Rebalancer
from cluster.controller.health.deaths import Deaths
from cluster.controller.records.state import ClusterState
from cluster.errors import NoRoomError
from cluster.placement.relief import FreeMemory, plan_relief
from cluster.reports import ChangeReport
from cluster.spec import ExpertKey

HOST_DEVICES = ("cpu", "emulated")
"""The devices whose experts lie in the host's memory, which all of its actors share."""

logger = logging.getLogger("expertmesh.controller")


class Reliever:
    """Moves experts off actors that cannot load them."""

    def __init__(
        self,
        state: ClusterState,
        deaths: Deaths,
        rebalancer: Rebalancer,
        report: Callable[..., ChangeReport],
    ) -> None:
        """``report`` logs a change and keeps it in the history."""
        self._state = state
        self._deaths = deaths
        self._rebalancer = rebalancer
        self._report = report
        self._relieving: dict[str, asyncio.Task[bool]] = {}

    async def relieve(self, actor_id: str, error: NoRoomError) -> bool:
        """Move as many experts off an actor as its memory lacks bytes for.

        Returns false, and moves nothing, where other actors have no room for that many, or one of
        them fails to load. An actor that serves is relieved in the background, and false is
        returned: its keeper, which calls this, has to see to it that it unloads experts meanwhile.
        """
        if actor_id not in self._state.placement.generations:
            return await self._relieve(actor_id, error)
        if actor_id not in self._relieving:
            task = asyncio.create_task(self._relieve(actor_id, error), name=f"relieve {actor_id}")
            self._relieving[actor_id] = task
            task.add_done_callback(lambda task: self._ended(actor_id, task))
        return False

    async def relieve_waiting(self, actor_id: str, reason: str) -> None:
        """Move the experts that nobody holds off an actor that waits for a place.

        Moves nothing where other actors have no room for all of them. Once the actor has a place,
        it gets experts as any actor that comes up empty.
        """
        async with self._rebalancer.plan_lock:
            state = self._state
            missing = set(state.placement.missing())
            lost = [key for key in state.shares.get(actor_id, ()) if key in missing]
            sizes = self._expert_bytes()
            size = sum(sizes[key.model] for key in lost)
            if lost:
                what = f"{actor_id} hands off experts that nobody holds"
                await self._move(actor_id, lost, size, what, reason)

    def close(self) -> None:
        """Cancel the moves in the background."""
        for task in list(self._relieving.values()):
            task.cancel()

    def _ended(self, actor_id: str, task: asyncio.Task[bool]) -> None:
        del self._relieving[actor_id]
        if not task.cancelled() and task.exception() is not None:
            logger.error("could not move experts off %s (%r)", actor_id, task.exception())

    async def _relieve(self, actor_id: str, error: NoRoomError) -> bool:
        """See :meth:`relieve`; waits until the experts have moved."""
        async with self._rebalancer.plan_lock:
            missing_bytes = error.missing_bytes or max(self._expert_bytes().values())
            what = f"{actor_id} hands off experts that it has no room for"
            share = self._state.shares[actor_id]
            return await self._move(actor_id, share, missing_bytes, what, str(error))

    async def _move(
        self, actor_id: str, movable: list[ExpertKey], size_bytes: int, what: str, reason: str
    ) -> bool:
        """Move this many bytes of the ``movable`` experts to other actors, or none at all."""
        state, began_at_s = self._state, time.monotonic()
        rooms, free_bytes = self._rooms(actor_id)
        change, freed_bytes = plan_relief(
            actor_id,
            size_bytes,
            {**state.shares, actor_id: movable},
            self._expert_bytes(),
            rooms,
            free_bytes,
            state.min_copies,
        )
        if freed_bytes < size_bytes:
            logger.error(
                "%s: other actors have room for %s of the %s bytes that are missing",
                actor_id,
                f"{freed_bytes:,}",
                f"{size_bytes:,}",
            )
            return False
        free = dict.fromkeys((actor_id, *change.added), math.inf)  # the plan has looked
        moved = await self._rebalancer.carry_out(change.added, change.dropped, free)
        self._report(what, reason, moved, began_at_s)
        return moved.outcome == "committed"

    def _expert_bytes(self) -> dict[str, int]:
        return {model.model: model.expert_bytes for model in self._state.models}

    def _rooms(self, actor_id: str) -> tuple[list[FreeMemory], dict[str, float]]:
        """Return the rooms of other actors that serve, and the free bytes of their memories."""
        state, rooms = self._state, []
        free_bytes: dict[str, float] = {}
        own = _memory(*self._deaths.place_of(actor_id))
        for other, report in state.reports.items():
            memory = _memory(report.node, report.device)
            is_used = other in state.placement.generations and other not in state.fleet.standby
            if other == actor_id or memory == own or not is_used:
                continue
            rooms.append(FreeMemory(other, report.node, memory, self._budget_bytes(other)))
            free_bytes[memory] = min(report.free_bytes, free_bytes.get(memory, math.inf))
        return rooms, free_bytes

    def _budget_bytes(self, actor_id: str) -> float:
        """Return what is left of an actor's budget."""
        state, budgets_bytes = self._state, self._state.fleet.budgets_bytes
        if budgets_bytes is None:
            return math.inf
        sizes = self._expert_bytes()
        used_bytes = sum(sizes[key.model] for key in state.shares[actor_id])
        return budgets_bytes[actor_id] - used_bytes - state.retained_bytes(actor_id)


def _memory(node: str, device: str) -> str:
    """Return the name of a memory, which actors on a node's processors share, or on a card."""
    return f"{'host' if device in HOST_DEVICES else device} of {node}"
