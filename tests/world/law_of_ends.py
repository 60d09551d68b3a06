"""The law of ends: few of a bad request, orphans of a lease alone, and ever later successors."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import ExpertMeshError
from cluster.reports import ChangeReport
from tests.world.kernel import Process

if TYPE_CHECKING:
    from tests.world.world import World

MAX_ENDS = {"router": 6, "actor": 20}
"""The processes that a bad request may end: some with others, some alone, and their copies."""
OUTCOMES = {"balanced", "committed", "planned", "unchanged", "pending", "failed"}
FIRST_LIVES = 4
"""The lives in a second of an actor that dies as soon as it serves; waits then double."""
ORPHANS_S = 95.0
"""How long an actor may outlive its application."""
ORPHANS_WAIT_S = 75.0
"""How long it does at least, where nothing else happens: its lease and then some, less a few
heartbeats."""


class LawOfEnds:
    """Watches the processes of a world that end themselves."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ends: Counter[str] = Counter()
        self._orphaned_at_s = -math.inf

    def exits(self, process: Process, code: int) -> None:
        """Look at a process that ends itself; ``code`` is 0 for an orphan."""
        world = self._world
        role = "actor" if process.name.startswith("expertmesh:") else "router"
        if not code and world.serve.is_wanted:
            world.law.broken("only orphans end themselves", process.name)
        elif not code and not world.happenings.faults():
            waited_s = world.kernel.now_s - self._orphaned_at_s
            if waited_s < ORPHANS_WAIT_S:
                text = f"{process.name} ends after {waited_s:.1f} s"
                world.law.broken("orphans wait", text)
        if code:
            self._ends[role] += 1
            if self._ends[role] == MAX_ENDS[role] + 1:
                world.law.broken(
                    "a bad request ends few processes", f"{self._ends[role]} of {role}"
                )

    def changed(self, answer: dict[str, Any]) -> None:
        """Look at the answer to an operator's order: who went has left, or it says why not."""
        if "error" in answer:
            return
        world, report, controller = self._world, answer["report"], self._world.controller()
        kind, _, reason = report.outcome.partition(": ")
        if kind not in OUTCOMES or (kind in ("failed", "pending") and not reason):
            world.law.broken("orders say what came of them", report.outcome)
        if controller is None or kind != "committed" or not isinstance(report, ChangeReport):
            return
        placement = controller._state.placement
        left = placement.generations.keys() & set(report.removed)
        if left and placement.order == (report.epoch, report.version):
            world.law.broken("who is drained goes", ", ".join(sorted(left)))

    def not_changed(self, method: str, error: Exception) -> None:
        """Look at the error of an operator's order."""
        if not isinstance(error, ExpertMeshError | RayActorError | RayTaskError | TimeoutError):
            text = f"{method}: {type(error).__name__}: {error}"
            self._world.law.broken("orders say what came of them", text[:200])

    def looped(self, actor_id: str, lives: int) -> None:
        """Look at an actor that died as soon as it served, so many times.

        Where more happens, other orders may create it.
        """
        world = self._world
        world.note(f"{actor_id} died {lives} times")
        hit = world.happenings.hit
        if len(hit) == 1 and lives > FIRST_LIVES + math.log2(max(hit[0].for_s, 1.0)):
            world.law.broken("a loop of deaths backs off", f"{lives} lives of {actor_id}")

    def orphaned(self) -> None:
        """End an application without a word to its actors, and look whether they follow."""
        world = self._world
        world.serve.is_wanted = False
        self._orphaned_at_s = world.kernel.now_s
        for deployment in world.serve.deployments.values():
            for replica in deployment.replicas:
                world.kernel.end(replica.process)
        world.run(world.kernel.now_s + ORPHANS_S)
        left = [actor.name for actor in world.happenings.actors()]
        if left:
            world.law.broken("no actor outlives its application", ", ".join(left))
