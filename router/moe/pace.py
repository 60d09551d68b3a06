"""Measures how long actors take to answer, to tell a hung actor from a busy one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from router.control.heard import RECENT_S, HeardActors

STALL_S = 0.25
"""The shortest stall. On a busy machine a killed process takes up to this long to die and to close
its connections."""
SLACK = 3.0
DECAY = 0.98
MAX_DOUBLINGS = 16
Actor = tuple[str, int]
"""An actor's id and generation."""


class LatencyTracker:
    """The longest recent times of answers, by the number of rows."""

    def __init__(self) -> None:
        """Start without any answer; nothing counts as a stall yet."""
        self._longest_s: dict[int, float] = {}
        """Keyed by the bit length of the number of rows; decays with every answer."""
        self._left_out: Counter[Actor] = Counter()
        """How often in a row the pairs of an actor were left out of a step."""

    def note(self, rows: int, took_s: float | None, actors: Iterable[Actor]) -> None:
        """Record the time in which all ``actors`` answered, each of at most ``rows`` rows.

        It is ``None`` if nobody waited for the answers: the time is then the router's own
        computation, and says nothing about the actors.
        """
        if self._left_out:
            for actor in actors:
                self._left_out.pop(actor, None)
        if took_s is None:
            return
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

    def left_out(self, actors: Iterable[Actor]) -> None:
        """Record that the pairs of actors were left out of a step, since no answer had come."""
        self._left_out.update(actors)

    def answer_timeout_s(self, actor_id: str, generation: int, rows: int) -> float:
        """Return how long an actor without another copy may take from a layer's start.

        It may take so long even where a request's deadline comes earlier. That is a stall, and
        twice as long each time that its pairs were left out in a row.
        Otherwise requests with little time could keep a slow actor from ever answering the others.
        Before the first answer a stall is ``STALL_S``.
        """
        stall_s = self.stall_s(rows)
        doublings = min(self._left_out.get((actor_id, generation), 0), MAX_DOUBLINGS)
        return (STALL_S if stall_s == math.inf else stall_s) * 2.0**doublings


def note_heard(heard: HeardActors, actor_id: str, generation: int, now_s: float) -> None:
    """Note an answer of an actor."""
    if now_s - heard.latest_s > RECENT_S:
        heard.since_s = now_s
    heard.latest_s = heard.at_s[actor_id, generation] = now_s
