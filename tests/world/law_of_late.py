"""The law of what comes late: a reason to wait, or to leave a place, is forgotten in time.

It judges worlds in which little else happens, since every other fault may delay a remedy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tests.world.kernel import Process

if TYPE_CHECKING:
    from tests.world.ray_api import Handle
    from tests.world.world import World

ENDS = {"dies", "actor dies again and again"}
LONGEST_S = 62.0
"""How long an actor may be without a successor, however often it died: a minute and a bit."""
FORGIVEN_S, SOON_S = 90.0, 1.0
"""How long an actor worked that has its successor so soon, after a few deaths long ago."""
NODE_FORGIVEN_S = 62.0
"""How long a node is avoided after one bad end, and a bit."""
ASKED_AGAIN_S = 15.0
"""How long after it was slow a copy may be avoided."""
NEW_S = 3.5, 9.0
"""From when a successor has its part until when its predecessor would be avoided."""
MIN_PRODUCTS = 300
LEAST = 0.5
"""The share of its even part of all products that a copy computes at least."""


class LawOfLate:
    """Watches the lives of actors, and what copies compute, for a long time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ended_at_s: dict[str, list[float]] = defaultdict(list)
        self._waiting: set[str] = set()
        """Actors without a successor."""
        self._products: Counter[str] = Counter()

    def _kinds(self) -> set[str]:
        return {event.kind for event in self._world.happenings.hit}

    def lives(self, process: Process, what: str) -> None:
        """Note the end of an actor."""
        if what == "ends" and process.name.startswith("expertmesh:"):
            actor_id = _actor_of(process.name)
            self._ended_at_s[actor_id].append(self._world.kernel.now_s)
            self._waiting.add(actor_id)

    def look(self) -> None:
        """Look at actors that have no successor yet."""
        now_s = self._world.kernel.now_s
        for actor_id in sorted(self._waiting):
            waited_s = now_s - self._ended_at_s[actor_id][-1]
            if self._kinds() <= ENDS and waited_s > LONGEST_S:
                self._waiting.discard(actor_id)
                self._broken("a successor comes in time", f"{actor_id} waits {waited_s:.1f} s")

    def placed(self, handle: Handle, before: str | None) -> None:
        """Look how soon a new actor comes, and at its node."""
        actor_id = _actor_of(handle.name)
        self._waiting.discard(actor_id)
        ended_at_s, now_s = self._ended_at_s[actor_id], self._world.kernel.now_s
        if before is None or not ended_at_s:
            return
        if len(ended_at_s) > 1 and self._kinds() <= ENDS:
            worked_s, waited_s = ended_at_s[-1] - ended_at_s[-2], now_s - ended_at_s[-1]
            if worked_s > FORGIVEN_S and waited_s > SOON_S:
                self._broken("deaths are forgiven", f"{actor_id} waits {waited_s:.1f} s")
        self._is_used_again(handle)

    def _is_used_again(self, handle: Handle) -> None:
        """The emptiest node gets the next actor again, where one actor ended badly long ago."""
        world = self._world
        earlier = [at_s for each in self._ended_at_s.values() for at_s in each][:-1]
        if self._kinds() != {"node's device raises", "dies"} or world.setting.min_copies > 1:
            return
        if len(earlier) != 1 or world.kernel.now_s - earlier[0] < NODE_FORGIVEN_S:
            return
        free = {node.name: node.free_slots() for node in world.cluster.nodes.values()}
        free[handle.node.name] += 1
        if free[handle.node.name] < max(free.values()):
            self._broken("a node is used again", f"{handle.name} is on {handle.node.name}: {free}")

    def computed(self, process: Process) -> None:
        """Note a product, once a copy that was slow, or is new, is to be asked."""
        hit, setting, now_s = (
            self._world.happenings.hit,
            self._world.setting,
            self._world.kernel.now_s,
        )
        if len(hit) != 1 or setting.min_copies < 2 or setting.autoscales:
            return
        after_s = now_s - hit[0].at_s - hit[0].for_s
        is_of_new = hit[0].kind == "dies" and NEW_S[0] < after_s < NEW_S[1]
        if is_of_new or (hit[0].kind == "slow once" and after_s > ASKED_AGAIN_S):
            self._products[process.name] += 1

    def calmed(self) -> None:
        """Look whether each copy has computed its part."""
        total, actors = self._products.total(), self._world.happenings.actors()
        if total < MIN_PRODUCTS:
            return
        for handle in actors:
            own = self._products[handle.name]
            if own < LEAST * total / len(actors):
                self._broken("who is well is asked", f"{own} of {total} products on {handle.name}")

    def _broken(self, law: str, text: str) -> None:
        self._world.law.broken(law, text)


def _actor_of(name: str) -> str:
    return name.rpartition(":g")[0].rpartition(":")[2]
