"""The law of copies: they become fewer than the least number by deaths alone, and lie apart.

A controller learns from routers what actors hold that it cannot reach. Its predecessor may reach
them, and have them give an expert back; the map is then of the past, and its correction no change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.controller.records.state import ClusterState
from cluster.placement.placement import Placement
from cluster.spec import ExpertKey

if TYPE_CHECKING:
    from tests.world.ray_api import Handle
    from tests.world.world import World


class LawOfCopies:
    """Looks at each change of the placement, and at what actors give back."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._taken_in: dict[tuple[str, ExpertKey], int] = {}
        """The epoch whose controller took an expert from an actor that another cannot reach."""

    def called(self, handle: Handle, method: str, args: Sequence[Any]) -> None:
        """Note the experts that an actor is to give back."""
        if method != "unload":
            return
        epoch, keys = args
        is_unheard = self._is_out_of_reach(handle)
        for key in keys:
            if is_unheard:
                self._taken_in[handle.name, ExpertKey(*key)] = epoch
            else:
                self._taken_in.pop((handle.name, ExpertKey(*key)), None)

    def _is_out_of_reach(self, handle: Handle) -> bool:
        """Return whether a controller, which may not have begun its epoch yet, cannot call it."""
        world, node = self._world, handle.process.node
        is_cut, cut_off = world.network.is_cut, world.cluster.cut_off
        return any(
            each.pid in cut_off or is_cut(each.node, node) or is_cut(node, each.node)
            for each in world.kernel.processes
            if each.is_alive and each.name.startswith("controller/")
        )

    def published(self, before: Placement, after: Placement, controller: ClusterState) -> None:
        for key, holders in after.holders.items():
            earlier = before.holders.get(key, ())
            least = min(len(earlier), controller.min_copies)
            if key.model not in controller.keys or len(holders) >= least:
                continue
            lost = [a for a in earlier if a not in holders and a in after.generations]
            if any(a not in after.generations for a in earlier):
                continue
            for actor_id in lost:
                name = self._world.name_of(actor_id, after.generations[actor_id])
                if self._taken_in.get((name, key), after.epoch) >= after.epoch:
                    self._world.law.broken(
                        "copies are kept", f"{key[1:]} has {len(holders)} copies: not on {actor_id}"
                    )
                    break

    def crowded(self) -> str:
        """Say which copies could be on more nodes than they are; nothing where none could."""
        controller = self._world.controller()
        if controller is None:
            return ""
        state, now_s = controller._state, self._world.kernel.now_s
        avoided = controller._keeper.deaths.avoided_nodes(now_s)
        free = {
            node.name
            for node in self._world.cluster.nodes.values()
            if node.is_alive and not node.is_draining and node.free_slots() > 0
        } - avoided.keys()
        pairs = Counter(
            (actor_id, state.nodes.get(other, ""))
            for holders in state.placement.holders.values()
            for actor_id in holders
            for other in holders
            if other != actor_id
        )
        for actor_id in state.placement.generations:
            here = pairs[actor_id, state.nodes.get(actor_id, "")]
            for node in free:
                if pairs[actor_id, node] < here:
                    return f"{actor_id} has {here} copies beside it, and would have fewer on {node}"
        return ""
