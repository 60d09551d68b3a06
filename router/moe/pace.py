"""Measures how long actors take to answer, to tell a hung actor from a busy actor."""

from __future__ import annotations

STALL_S = 0.25
"""The shortest stall. On a busy machine a killed process takes up to this long to die and to close
its connections."""
SLACK = 3.0
DECAY = 0.98


class Pace:
    """The longest recent times of answers, by the number of rows."""

    def __init__(self) -> None:
        """Start without any answer; nothing counts as a stall yet."""
        self._longest_s: dict[int, float] = {}
        """Keyed by the bit length of the number of rows; decays with every answer."""

    def note(self, rows: int, took_s: float) -> None:
        """Record the time in which all parts, of at most ``rows`` rows each, were answered."""
        size = rows.bit_length()
        self._longest_s[size] = max(took_s, DECAY * self._longest_s.get(size, 0.0))

    def stall_s(self, rows: int) -> float:
        """Return how long an actor may take before another copy is asked.

        That is ``SLACK`` times the longest recent time, and at least ``STALL_S``. It is scaled up
        for more rows than were ever answered, and infinite before the first answer.
        """
        size = rows.bit_length()
        if not self._longest_s:
            return float("inf")
        nearest = min((s for s in self._longest_s if s >= size), default=max(self._longest_s))
        return max(STALL_S, SLACK * self._longest_s[nearest] * 2 ** max(0, size - nearest))
