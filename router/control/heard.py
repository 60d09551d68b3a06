"""The actors that a router hears: the controller asks for them before it replaces one."""

from __future__ import annotations

import math
import time

from cluster.reports import Heard

RECENT_S = 1.0
"""A router's own network is up where an actor answered within this time, and actors have answered
for so long without a longer pause. Right after a pause, the network may just have come back."""
KEPT_S = 60.0


class HeardActors:
    """When each actor last answered a router; dispatchers write it, on threads of their own."""

    def __init__(self) -> None:
        """Begin without any."""
        self.at_s: dict[tuple[str, int], float] = {}
        """By id and generation, in seconds of the monotonic clock."""
        self.since_s = self.latest_s = -math.inf
        """When the first answer came after a pause of more than ``RECENT_S``, and the last one."""

    def ages(self) -> dict[str, Heard]:
        """Return for each actor the generation that answered last, and how long ago."""
        now_s = time.monotonic()
        found: dict[str, Heard] = {}
        for (actor_id, generation), at_s in sorted(self.at_s.copy().items()):
            if now_s - at_s > KEPT_S:
                self.at_s.pop((actor_id, generation), None)
            else:
                found[actor_id] = (generation, now_s - at_s)
        return found

    def hears_others(self, actor_id: str) -> bool:
        """Return whether the router's network is up: other actors answer, and have for a while."""
        since_s = time.monotonic() - RECENT_S
        if self.since_s > since_s:
            return False
        return any(a != actor_id and at_s > since_s for (a, _), at_s in self.at_s.copy().items())
