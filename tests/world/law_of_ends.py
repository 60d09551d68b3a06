"""The law of ends: few of a bad request, orphans of a lease alone, and ever later successors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.world.kernel import Process

if TYPE_CHECKING:
    from tests.world.world import World

MAX_ENDS = {"router": 6, "actor": 20}
"""The processes that a bad request may end: some with others, some alone, and their copies."""
MAX_LIVES = 6
"""The lives in six seconds of an actor that dies as soon as it serves."""
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
            if self._ends[role] == MAX_ENDS[role] + 1:
                world.law.broken(
                    "a bad request ends few processes", f"{self._ends[role]} of {role}"
                )

    def looped(self, actor_id: str, lives: int) -> None:
        """Look at an actor that died as soon as it served, so many times.

        Where more happens, other orders may create it.
        """
        world = self._world
        world.note(f"{actor_id} died {lives} times")
        if len(world.happenings.hit) == 1 and lives > MAX_LIVES:
            world.law.broken("a loop of deaths backs off", f"{lives} lives of {actor_id}")

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
