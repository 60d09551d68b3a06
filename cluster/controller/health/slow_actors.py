"""Says which actors are slow compared with the rest of their pool, as routers measure them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.controller.records.state import ClusterState
from cluster.placement.slowness import Actor, SlowActors, beside_twins
from cluster.reports import ActorStatus

logger = logging.getLogger("expertmesh.controller")


class SlowNotice:
    """The slow actors of one application; each is logged once."""

    def __init__(self, state: ClusterState) -> None:
        """Begin without any."""
        self._state = state
        self._actors = SlowActors()

    @property
    def slow(self) -> Mapping[str, float]:
        """How many times as long as the rest of its pool each slow actor takes."""
        return self._actors.slow

    def look(self, reports: Iterable[Mapping[Actor, float]], now_s: float) -> None:
        """Take the times that routers report."""
        living = self._state.placement.generations
        measured = beside_twins(reports, self._state.fleet.pool_of, living)
        came, went = self._actors.look(measured, living, now_s)
        for actor_id in came:
            logger.warning(
                "%s g%d on %s is slow: it takes %.1f times as long as the rest of its pool",
                actor_id,
                living[actor_id],
                self._state.nodes.get(actor_id, "?")[:10],
                self.slow[actor_id],
            )
        for actor_id in went:
            logger.info("%s is no longer slow", actor_id)

    def marked(self, status: ActorStatus) -> ActorStatus:
        """Return an actor's status with its slowness."""
        slowness = self._actors.slowness.get(status.actor_id, 0.0)
        return replace(status, slowness=slowness, is_slow=status.actor_id in self.slow)
