"""Anti-affinity: moves actors to other nodes, away from other copies of their experts.

The actors of a lost machine start beside the others, so copies of an expert may share a node. They
move apart one at a time, while all others serve: at once when a node joins, else when there is room
for them and no actor has ended badly there lately.
"""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.controller.lifecycle.keeper import Keeper
from cluster.controller.records.members import Members
from cluster.controller.records.pool import ExpertPool, kind_of
from cluster.controller.records.state import ClusterState
from cluster.placement.placement import crowding, less_crowded_node

NODES_CHECK_S, COPIES_CHECK_S = 5.0, 30.0
ALL_COPIES_TIMEOUT_S = 60.0
KNOWN_TIMEOUT_S, LOOK_S = 10.0, 0.02
"""How long an actor waits for routers to know that it leaves, and how often it checks."""

logger = logging.getLogger("expertmesh.controller")


class AntiAffinity:
    """Watches Ray's nodes for one controller."""

    def __init__(
        self, state: ClusterState, expert_pool: ExpertPool, keeper: Keeper, members: Members
    ) -> None:
        """Nothing moves before :meth:`run_forever`.

        ``keeper`` knows the nodes to avoid, ``members`` which placement each router has.
        """
        self._state = state
        self._expert_pool = expert_pool
        self._keeper = keeper
        self._members = members

    async def run_forever(self, known: set[str]) -> None:
        """Look again and again for nodes beyond the ``known`` ones, and for crowded copies."""
        looked_at_s = time.monotonic()
        while True:
            await asyncio.sleep(NODES_CHECK_S)
            try:
                nodes = set(await asyncio.to_thread(self._expert_pool.nodes))
                if nodes - known or time.monotonic() - looked_at_s >= COPIES_CHECK_S:
                    looked_at_s = time.monotonic()
                    for actor_id in tuple(self._state.shares):
                        await self._move(actor_id)
            except TimeoutError:
                continue  # copies are missing, so nothing may move yet
            except Exception as error:  # Ray's control store may be away for a moment
                logger.warning("Ray did not list its nodes (%s)", kind_of(error))
                continue
            known = nodes

    async def _move(self, actor_id: str) -> None:
        """Move an actor to a node with fewer copies of its experts, if there is one.

        The actor leaves the placement, and is killed once all routers know; its keeper creates the
        successor there. Raises ``TimeoutError`` while copies are missing.
        """
        state = self._state
        here = state.nodes.get(actor_id)
        if here is None or not crowding(actor_id, here, state.shares, state.nodes):
            return
        async with asyncio.timeout(ALL_COPIES_TIMEOUT_S):
            await state.wait_for(lambda: state.placement.fewest_copies() >= state.min_copies)
        if actor_id not in state.shares:
            return  # it left the fleet meanwhile
        spec = state.fleet.specs[actor_id]
        found = await asyncio.to_thread(self._expert_pool.nodes_for, spec)
        candidates = set(found) - self._keeper.deaths.avoided_nodes(time.monotonic()).keys()
        node = less_crowded_node(actor_id, candidates, state.shares, state.nodes)
        if node is None:
            return
        logger.info("moving %s to node %s, away from other copies", actor_id, node[:10])
        await state.check_epoch()
        state.nodes[actor_id] = node
        await state.publish(lambda placement: placement.without(actor_id))
        await self._until_known(state.placement.order)
        handle = state.handles.get(actor_id)
        if handle is not None and actor_id not in state.placement.generations:
            await self._keeper.processes.end(handle)  # else it has died, or its successor serves

    async def _until_known(self, order: tuple[int, int]) -> None:
        """Wait until all routers know a placement; give up when one of them must be cut off."""
        until_s = time.monotonic() + KNOWN_TIMEOUT_S
        while not self._members.all_know("router", order) and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
