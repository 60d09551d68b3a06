"""The law of frames: where nothing damages bytes or rows, no router gets a malformed answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.transport.base import CallFailure
from router.engine.replica import RouterReplica

if TYPE_CHECKING:
    from tests.world.world import World

DAMAGING = {"bytes damaged", "rows lost"}
MALFORMED = ("malformed", CallFailure.DAMAGED.value)


def look_at_frames(world: World) -> None:
    """Look at what the routers that run have counted."""
    if any(event.kind in DAMAGING for event in world.happenings.hit):
        return
    for replica in world.serve.deployments["router"].running():
        router: RouterReplica = replica.handle.instance
        number = sum(router._dispatcher.retries[reason] for reason in MALFORMED)
        if number:
            world.law.broken("frames are whole", f"{number} malformed at {replica.process.name}")
