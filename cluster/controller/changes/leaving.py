"""Nodes that are to go: their actors get successors elsewhere, and hand over their experts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from cluster.controller.changes.elastic import COMMAND, Elastic
from cluster.controller.records.pool import ExpertPool
from cluster.controller.records.state import ClusterState
from cluster.errors import InvalidRequestError
from cluster.reports import ChangeReport

SUCCESSOR_TIMEOUT_S = 10.0
"""How long to wait for successors of actors on a draining node, which may be gone in 30 s."""
NODE_PREFIX = 6

logger = logging.getLogger("expertmesh.scaling")


class LeavingNodes:
    """Empties the nodes that Ray drains, by itself or because an operator asks for it."""

    def __init__(self, state: ClusterState, expert_pool: ExpertPool, elastic: Elastic) -> None:
        """``elastic`` changes the fleet."""
        self._state = state
        self._fleet = state.fleet
        self._expert_pool = expert_pool
        self._elastic = elastic
        self._succeeded: set[str] = set()
        """Actors on draining nodes that have a successor."""

    async def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Have Ray drain a node, named by a prefix of its id, and empty it.

        Ray then starts nothing there, and Serve replaces the node's routers and gateways. Returns
        when no actor is left. Raises :class:`InvalidRequestError` if there is no such node or Ray
        refuses, as for the head, :class:`UnavailableError` while another actor is away.
        """
        node = await self._named(target)
        what = f"drain node {node}"
        async with self._elastic.lock:
            await self._expert_pool.drain_node(node, dry_run)
            if not dry_run:
                return await self._hand_over({node}, what, COMMAND)
            leaving = self._actors_on({node})
            pools = [self._fleet.pool_of[a] for a in leaving if a not in self._fleet.standby]
            coming = self._elastic.coming(pools)
            return await self._elastic.shrink(leaving, what, True, COMMAND, coming)

    async def look(self) -> None:
        """Empty the nodes that Ray is about to take away by now."""
        draining = await asyncio.to_thread(self._expert_pool.draining)
        self._succeeded &= self._fleet.specs.keys()
        if leaving := self._actors_on(draining):
            async with self._elastic.lock:
                what = f"{', '.join(leaving)} to go with their node"
                await self._hand_over(draining, what, "Ray drains it")

    async def _hand_over(self, draining: Collection[str], what: str, reason: str) -> ChangeReport:
        """Drain the actors on nodes that Ray drains, after asking for successors elsewhere."""
        began_at_s = time.monotonic()
        leaving = self._actors_on(draining)
        # A standby actor needs no successor here: keep_standby starts another elsewhere.
        has_successor = self._succeeded | self._fleet.standby
        without = [actor_id for actor_id in leaving if actor_id not in has_successor]
        pools = [self._fleet.pool_of[actor_id] for actor_id in without]
        added = await self._elastic.grow(pools, draining)
        self._succeeded |= set(without)
        up = await self._elastic.wait_up(added, SUCCESSOR_TIMEOUT_S)
        self._elastic.note_spread(up)
        report = await self._elastic.shrink(leaving, what, False, reason)
        if added:
            logger.info("%s took over after %.1f s", ", ".join(up), time.monotonic() - began_at_s)
        if report.outcome == "committed":
            self._succeeded -= set(leaving)
        return report

    def _actors_on(self, nodes: Collection[str]) -> list[str]:
        """Return the actors on these nodes, and those that have a successor already."""
        return [
            actor_id
            for actor_id in self._fleet.specs
            if self._state.nodes.get(actor_id) in nodes or actor_id in self._succeeded
        ]

    async def _named(self, target: str) -> str:
        nodes = await asyncio.to_thread(self._expert_pool.nodes)
        found = [node for node in nodes if node.startswith(target)]
        if len(target) < NODE_PREFIX or len(found) != 1:
            raise InvalidRequestError(
                f"{target!r:.80} is neither an actor nor a prefix ({NODE_PREFIX} characters or "
                f"more) of the id of exactly one node; actors: {', '.join(self._fleet.specs)}",
                "target",
            )
        return found[0]
