"""The law of processes that end themselves: few of a bad request, and only orphans of a lease."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.world.kernel import Process

if TYPE_CHECKING:
    from tests.world.world import World

MOST_ENDS = {"router": 6, "actor": 20}
"""The processes that a bad request may end: some with others, some alone, and their copies."""
ORPHANS_S = 95.0
"""How long an actor may outlive its application."""


class LawOfEnds:
    """Watches the processes of a world that end themselves."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ends: Counter[str] = Counter()

    def exits(self, process: Process, code: int) -> None:
        """Look at a process that ends itself; ``code`` is 0 for an orphan."""
        world = self._world
        role = "actor" if process.name.startswith("expertmesh:") else "router"
        if not code and world.serve.is_wanted:
            world.law.broken("only orphans end themselves", process.name)
        if code:
            self._ends[role] += 1
            if self._ends[role] == MOST_ENDS[role] + 1:
                world.law.broken(
                    "a bad request ends few processes", f"{self._ends[role]} of {role}"
                )

    def orphaned(self) -> None:
        """End an application without a word to its actors, and look whether they follow."""
        world = self._world
        world.serve.is_wanted = False
        for deployment in world.serve.deployments.values():
            for replica in deployment.replicas:
                world.kernel.end(replica.process)
        world.run(world.kernel.now_s + ORPHANS_S)
        left = [actor.name for actor in world.happenings.actors()]
        if left:
            world.law.broken("no actor outlives its application", ", ".join(left))
