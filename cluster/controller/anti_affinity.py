"""Moving actors to a node that joins, where their copies share one with others of the same expert.

That is where a lost machine's actors went. They move one at a time, while all others serve.
"""

from __future__ import annotations

import asyncio
import logging

from cluster.controller.changes import Changes
from cluster.controller.pool import kind_of
from cluster.controller.state import Cluster
from cluster.placement.placement import less_crowded_node

NODES_CHECK_S = 5.0
WHOLE_TIMEOUT_S = 60.0

logger = logging.getLogger("expertmesh.controller")


class Apart:
    """Watches Ray's nodes for one controller."""

    def __init__(
        self, cluster: Cluster, changes: Changes, nodes: dict[str, str], min_copies: int
    ) -> None:
        """``nodes`` has the node of each actor, and says where its keeper puts its successor."""
        self._cluster = cluster
        self._changes = changes
        self._nodes = nodes
        self._min_copies = min_copies

    async def run_forever(self, known: set[str]) -> None:
        """Look for nodes beyond those that are ``known``, again and again."""
        while True:
            await asyncio.sleep(NODES_CHECK_S)
            try:
                nodes = set(await asyncio.to_thread(self._cluster.pool.nodes))
                if nodes - known:
                    for actor_id in self._changes.shares:
                        await self._move(actor_id)
            except TimeoutError:
                continue  # not whole now, so nothing may be moved yet
            except Exception as error:  # Ray's own is away for a moment
                logger.warning("the nodes are not known (%s)", kind_of(error))
                continue
            known = nodes

    async def _move(self, actor_id: str) -> None:
        async with asyncio.timeout(WHOLE_TIMEOUT_S):
            await self._cluster.wait_for(lambda now: now.fewest_copies() >= self._min_copies)
        candidates = await asyncio.to_thread(self._cluster.pool.nodes_for, actor_id)
        node = less_crowded_node(actor_id, candidates, self._changes.shares, self._nodes)
        if node is None:
            return
        logger.info("%s moves to node %s, apart from other copies", actor_id, node[:10])
        self._nodes[actor_id] = node
        await self._cluster.publish(lambda placement: placement.without(actor_id))
        for found_id, _, handle in await asyncio.to_thread(self._cluster.pool.find):
            if found_id == actor_id:
                self._cluster.pool.kill(handle)
