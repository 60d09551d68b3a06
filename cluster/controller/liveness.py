"""Telling an actor that hangs from one that has much to do: pure, with the caller's clock."""

from __future__ import annotations

HUNG_S = 60.0
SILENT_S = 3.0
SUSPECTED_S = 0.8
"""How long a heartbeat may stay unanswered, and how long while a router waits in vain too: then
two ways to the actor, which share no thread of it, are silent."""
LOOK_S = 0.1
"""How often to look whether a heartbeat has been answered."""


class Progress:
    """An actor's progress as its heartbeats tell it."""

    def __init__(self, now_s: float) -> None:
        """Begin as if something had just been computed."""
        self._steps = -1
        self._moved_s = now_s

    def is_hung(self, steps: int, queued_rows: int, now_s: float) -> bool:
        """Take a heartbeat; return whether rows have waited for ``HUNG_S`` and none was computed.

        ``steps`` counts the batches that the actor has computed, ``queued_rows`` wait now.
        """
        if steps != self._steps or queued_rows == 0:
            self._steps, self._moved_s = steps, now_s
        return now_s - self._moved_s >= HUNG_S


class Silence:
    """How long a heartbeat has not been answered, as one knows who looks every ``LOOK_S``.

    Where a look comes late, its process was kept from running, and so the actor may have been: no
    more than ``LOOK_S`` of that time counts.
    """

    def __init__(self, now_s: float) -> None:
        """Begin with the heartbeat's sending."""
        self._looked_s = now_s
        self._silent_s = 0.0

    def is_hung(self, is_suspected: bool, now_s: float) -> bool:
        """Take a look that found no answer; return whether none is to be expected any more.

        ``is_suspected`` says that a router waits in vain for rows of this actor.
        """
        self._silent_s += min(now_s - self._looked_s, LOOK_S)
        self._looked_s = now_s
        return self._silent_s >= (SUSPECTED_S if is_suspected else SILENT_S)
