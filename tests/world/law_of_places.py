"""The law of places: drained nodes are emptied by successors elsewhere, once; successors return.

It judges worlds in which little else happens, since every other fault may delay a drain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.controller.controller import Controller
    from tests.world.ray_api import Handle
    from tests.world.world import World

NOTICE_S = 8.0
"""How long a node that drains is still there."""
EMPTY_S = 7.5
"""How soon it is to be empty."""
OF_REQUESTS = "poison ends actors"
"""An event for which no node is to blame, and none avoided."""
RETURN_AFTER = {"dies", "crashes soon", "node added", "node's device raises", OF_REQUESTS}
"""The events after which a successor returns to a node that is not avoided."""


class LawOfPlaces:
    """Watches where the actors of a world are."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.moved: set[str] = set()
        """Actors that a controller has moved."""

    def _kinds(self) -> set[str]:
        return {event.kind for event in self._world.happenings.hit}

    def emptied(self, node: str, num_left: int) -> None:
        """Look at a node that is about to go, from which ``num_left`` actors were to go.

        Where nothing else happens its actors have successors, and experts all of their copies.
        Where the others have no memory it may keep its actors, which have one successor each.
        """
        world, controller, kinds = self._world, self._world.controller(), self._kinds()
        if controller is None or world.setting.autoscales:
            return
        fleet, wanted = set(controller._state.fleet.specs), world.setting.num_actors
        if kinds == {"node drains", "memory full"} and len(fleet) > wanted + num_left:
            text = f"{len(fleet)} actors in place of {wanted} and {num_left} successors"
            world.law.broken("who leaves has one successor", text)
        if kinds != {"node drains"}:
            return
        if left := self.actors_on(controller, node):
            world.law.broken("drains succeed", f"{', '.join(left)} on {node}")
        elif len(fleet) != wanted:
            world.law.broken("who leaves has one successor", f"{len(fleet)} actors of {wanted}")
        copies = controller._state.placement.fewest_copies(controller._state.keys)
        if copies < world.setting.min_copies:
            world.law.broken("drains succeed", f"an expert has {copies} copies")

    def actors_on(self, controller: Controller, node: str) -> list[str]:
        """Return the actors of the placement that are on a node."""
        state = controller._state
        return [a for a in sorted(state.placement.generations) if state.nodes.get(a) == node]

    def taken(self, actor_id: str) -> None:
        """Look at an actor on standby that is taken into use: its node does not drain."""
        controller = self._world.controller()
        node = controller and controller._state.nodes.get(actor_id)
        if node in self._world.cluster.draining():
            self._world.law.broken("a drained node gets no successors", f"{actor_id} on {node}")

    def placed(self, handle: Handle, before: str | None) -> None:
        """Look at the node of a new actor, whose predecessor was on the node ``before``.

        With several copies it returns there: else it may come to lie beside another copy.
        """
        world, controller = self._world, self._world.controller()
        if before is None or controller is None or world.setting.min_copies < 2:
            return
        actor_id = handle.name.rpartition(":g")[0].rpartition(":")[2]
        if self._kinds() - RETURN_AFTER or actor_id in self.moved:
            return
        avoided = controller._keeper.deaths.avoided_nodes(world.kernel.now_s)
        if before in avoided and self._kinds() != {OF_REQUESTS}:
            return
        own = world.cluster.nodes[before]
        if handle.node is not own and own.is_alive and own.free_slots() > 0:
            world.law.broken("a successor returns", f"{handle.name} from {before}")
