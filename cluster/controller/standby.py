"""Actors that are started and hold nothing, so that a pool which is to grow need not wait for one.

A process that imports torch takes seconds to start, and a machine that an autoscaler brings takes
minutes; an actor that stands by needs only its experts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from cluster.controller.changes import Changes
from cluster.controller.fleet import Fleet
from cluster.controller.state import Cluster
from cluster.placement.scaling import wanted_standby

logger = logging.getLogger("expertmesh.scaling")


class Standby:
    """Starts the actors of one application, and keeps some of them waiting."""

    def __init__(self, fleet: Fleet, cluster: Cluster, changes: Changes) -> None:
        """None is started yet."""
        self._fleet = fleet
        self._cluster = cluster
        self._changes = changes

    def start(self, pool: str, is_standby: bool = False) -> str:
        """Let an actor join a pool, and ask Ray for it; returns its id."""
        actor_id = self._fleet.add(pool, is_standby)
        self._changes.shares[actor_id] = []
        self._cluster.begin(actor_id)
        return actor_id

    def take(self, pool: str, apart_from: Collection[str] = ()) -> str | None:
        """Take one into use that is up, on none of these nodes; ``None`` where none stands by."""
        for actor_id in self._fleet.standby_of(pool):
            is_up = actor_id in self._cluster.placement.generations
            if is_up and self._cluster.node_of(actor_id) not in apart_from:
                self._fleet.take_into_use(actor_id)
                self._cluster.joined()
                return actor_id
        return None

    async def keep(self) -> None:
        """Have as many stand by as each pool wants."""
        for name, pool in self._fleet.pools.items():
            standing = self._fleet.standby_of(name)
            wanted = 0
            if pool.autoscaling is not None:
                wanted = wanted_standby(pool.autoscaling, len(self._fleet.of(name)))
            for _ in range(wanted - len(standing)):
                logger.info("%s is to stand by", self.start(name, is_standby=True))
            for actor_id in standing[wanted:]:
                await self._cluster.end(actor_id)
