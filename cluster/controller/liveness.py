"""Tells a hung actor from a busy one: pure, with the caller's clock."""

from __future__ import annotations

HUNG_S = 60.0
SILENT_S = 3.0
"""How long a heartbeat may stay unanswered."""
SUSPECTED_S = 0.8
"""The same while a router waits in vain too: then two ways to the actor that share no thread of it
are silent."""
LOOK_S = 0.1
"""Time between two looks whether a heartbeat is answered."""


class Progress:
    """An actor's progress, from its heartbeats."""

    def __init__(self, now_s: float) -> None:
        """Begin as if the actor had just computed a batch."""
        self._steps = -1
        self._moved_at_s = now_s

    def is_hung(self, steps: int, queued_rows: int, now_s: float) -> bool:
        """Take a heartbeat; returns whether rows have waited for ``HUNG_S`` without any batch.

        ``steps`` counts the batches that the actor has computed, ``queued_rows`` the waiting rows.
        """
        if steps != self._steps or queued_rows == 0:
            self._steps, self._moved_at_s = steps, now_s
        return now_s - self._moved_at_s >= HUNG_S


class Silence:
    """How long a heartbeat stays unanswered, for a caller that looks every ``LOOK_S``.

    A late look means that the caller's process did not run, and perhaps the actor's neither. So a
    look counts for at most ``LOOK_S``.
    """

    def __init__(self, now_s: float) -> None:
        """Begin when the heartbeat is sent."""
        self._checked_at_s = now_s
        self._silent_s = 0.0

    def is_hung(self, is_suspected: bool, now_s: float) -> bool:
        """Take a look without an answer; returns whether the actor counts as hung.

        ``is_suspected`` says that a router waits in vain for rows of this actor.
        """
        self._silent_s += min(now_s - self._checked_at_s, LOOK_S)
        self._checked_at_s = now_s
        return self._silent_s >= (SUSPECTED_S if is_suspected else SILENT_S)
