"""The state of the cluster that the controller owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ray.actor import ActorHandle

from cluster.controller.pool import ExpertPool
from cluster.placement.placement import Placement
from cluster.spec import ActorReport


class Cluster(Protocol):
    """What a controller has and does, as far as changes need it."""

    @property
    def pool(self) -> ExpertPool:
        """The actors' side."""
        ...

    @property
    def placement(self) -> Placement:
        """What is published."""
        ...

    @property
    def reports(self) -> Mapping[str, ActorReport]:
        """What each living actor has reported last."""
        ...

    @property
    def handles(self) -> Mapping[str, ActorHandle]:
        """The actors that are in the placement."""
        ...

    async def publish(self, change: Callable[[Placement], Placement]) -> None:
        """Publish what ``change`` makes of the placement; nothing where it raises."""
        ...

    async def wait_for(self, condition: Callable[[Placement], bool]) -> None:
        """Wait until the placement satisfies a condition."""
        ...

    def is_known(self, order: tuple[int, int]) -> bool:
        """Tell whether all routers that are heard of know this version or a newer one."""
        ...

    def look_at(self, actor_id: str) -> None:
        """Have an actor's keeper look at it now."""
        ...

    def begin(self, actor_id: str) -> None:
        """Bring up an actor that has joined the fleet; returns at once."""
        ...

    def joined(self) -> None:
        """Note that an actor which stood by is in use now."""
        ...

    async def end(self, actor_id: str) -> None:
        """End an actor that holds nothing any more, and take it out of the fleet."""
        ...

    def node_of(self, actor_id: str) -> str | None:
        """Return the node that an actor runs on, or ran on last, if it ever did."""
        ...
