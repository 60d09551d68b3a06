"""How long actors take to answer, so that an actor that hangs is told from a busy one."""

from __future__ import annotations

STALL_S = 0.25
"""A killed process may take so long to die, and to close its connections, on a busy machine."""
SLACK = 3.0
DECAY = 0.98


class Pace:
    """The longest answers of late, by the number of rows."""

    def __init__(self) -> None:
        """Begin without any answer; nothing counts as a stall yet."""
        self._longest_s: dict[int, float] = {}
        """By the number of bits of the number of rows; fades with every answer."""

    def note(self, rows: int, took_s: float) -> None:
        """Take the time in which parts of at most ``rows`` rows were all answered."""
        size = rows.bit_length()
        self._longest_s[size] = max(took_s, DECAY * self._longest_s.get(size, 0.0))

    def stall_s(self, rows: int) -> float:
        """Return how long an actor may take before another copy is asked.

        That is ``SLACK`` times the longest lately, and never less than ``STALL_S``; for more rows
        than were ever answered it grows in proportion, and it is infinite before any answer.
        """
        size = rows.bit_length()
        larger = [known for known in self._longest_s if known >= size]
        if larger:
            expected_s = self._longest_s[min(larger)]
        elif self._longest_s:
            largest = max(self._longest_s)
            expected_s = self._longest_s[largest] * 2 ** (size - largest)
        else:
            return float("inf")
        return max(STALL_S, SLACK * expected_s)
