"""The law of devices: broken ones are replaced, bad nodes are left, slow copies are spared.

It judges worlds in which little else happens, since every other fault may delay a remedy.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.world.kernel import Process

if TYPE_CHECKING:
    from tests.world.ray_api import Handle
    from tests.world.world import World

QUIET = {
    "device raises", "device yields NaN", "device slow", "copy stays slow", "burst", "clock jumps",
    "node added", "poison raises", "long prompts", "gateway unreachable",
}  # fmt: skip
REPLACED_S = 4.5
"""How long an actor may live whose device has failed at a batch."""
LEARN_S = 2.5
"""How long routers may need to learn that a copy is slow."""
MIN_PRODUCTS = 40
SPARED = 0.6
"""The share of its even part of all products that a slow copy may compute."""


class LawOfDevices:
    """Watches what the devices of a world compute."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._failed_at_s: dict[str, float] = {}
        self._node_of: dict[str, str] = {}
        self._slow: dict[str, tuple[float, float]] = {}
        self._products: Counter[str] = Counter()

    def _is_quiet(self, *others: str) -> bool:
        return all(
            event.kind in QUIET or event.kind in others for event in self._world.happenings.hit
        )

    def computed(self, process: Process, fault: str) -> None:
        """Note a product of an actor; ``fault`` says how it failed."""
        now_s = self._world.kernel.now_s
        if fault:
            self._failed_at_s.setdefault(process.name, now_s)
        if any(now_s >= since_s + LEARN_S for _, since_s in self._slow.values()):
            self._products[process.name] += 1

    def slowed(self, name: str, slow: float) -> None:
        """Note that the device of a process is slow from now on."""
        self._slow[name] = slow, self._world.kernel.now_s

    def mended(self, name: str) -> None:
        """Look at what a slow device has computed, now that it is slow no longer."""
        world = self._world
        if self._slow.pop(name, None) is None:
            return
        if [event.kind for event in world.happenings.hit] != ["copy stays slow"]:
            return
        total, own = sum(self._products.values()), self._products[name]
        world.note(f"{own} of {total} products on the slow {name}")
        if total < MIN_PRODUCTS:
            return
        if own > SPARED * total / world.setting.num_actors:
            world.law.broken("a slow copy is spared", f"{own} of {total} products on {name}")

    def placed(self, handle: Handle) -> None:
        """Look at the node of a new actor: it is not the one where its predecessor was broken."""
        world, node = self._world, handle.node.name
        actor_id, _, number = handle.name.rpartition(":g")
        before = f"{actor_id}:g{int(number) - 1}"
        is_bad = self._node_of.get(before) == node and world.is_broken(handle.process)
        if is_bad and before in self._failed_at_s and self._is_quiet("node's device raises"):
            bad = [name for name in world.cluster.nodes if world.has_bad_devices(name)]
            others = [n for n in world.cluster.nodes.values() if n.is_alive and n.name not in bad]
            if any(n.free_slots() for n in others):
                world.law.broken("a successor leaves a bad node", handle.name)
        world.places.placed(handle, self._node_of.get(before))
        world.late.placed(handle, self._node_of.get(before))
        self._node_of[handle.name] = node

    def calmed(self) -> None:
        """Look whether actors live whose devices have failed for long."""
        world = self._world
        for handle in world.happenings.actors():
            name = handle.process.name
            failed_s = world.kernel.now_s - self._failed_at_s.get(name, world.kernel.now_s)
            if failed_s > REPLACED_S and world.has_bad_devices(name) and self._is_quiet():
                world.law.broken("a broken device is replaced", f"{name} after {failed_s:.1f} s")
