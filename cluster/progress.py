"""Telling an actor that computes nothing from one that merely has much to do."""

from __future__ import annotations

HUNG_S = 60.0


class Progress:
    """An actor's progress as its heartbeats tell it: pure, with the caller's clock."""

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
