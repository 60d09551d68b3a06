"""Log lines that strangers can cause: one in a while stands for all."""

from __future__ import annotations

import time

PERIOD_S = 10.0


class LogLimit:
    """Lets one line through in each :data:`PERIOD_S`."""

    def __init__(self) -> None:
        """Let the first line through."""
        self._num_events = 0
        self._logged_at_s = -PERIOD_S

    def count(self) -> int:
        """Count an event; returns how many a line of now stands for, 0 if none is due."""
        self._num_events += 1
        now_s = time.monotonic()
        if now_s - self._logged_at_s < PERIOD_S:
            return 0
        num_events, self._num_events, self._logged_at_s = self._num_events, 0, now_s
        return num_events
