"""What the engine's thread counts: plain numbers, without a lock and without a metrics library.

Only the engine's thread writes; another may read at any time, and sees each number as it was a
moment ago.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Values

from router.engine.scheduler import Sequence
from router.observability.catalogue import LATENCY_BUCKETS_S, TOKEN_BUCKETS_S


class Distribution:
    """How many values fell under each bound, and their sum."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Values[float]) -> None:
        """``bounds`` are the upper ones, ascending; one without a bound follows."""
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """Return how many values are at most each bound, and in the end how many there are."""
        counts = self._counts.copy()
        for place in range(1, len(counts)):
            counts[place] += counts[place - 1]
        return counts


class EngineTally:
    """Times and tokens of one engine; :class:`router.engine.scheduler.Times` has a sequence's own.

    A sequence that goes on after a failure brings tokens with it; only what follows them counts.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self.queue_time_s = Distribution(LATENCY_BUCKETS_S)
        self.prefill_time_s = Distribution(LATENCY_BUCKETS_S)
        self.decode_time_s = Distribution(LATENCY_BUCKETS_S)
        self.inter_token_s = Distribution(TOKEN_BUCKETS_S)
        self.steps = 0
        self.step_tokens = 0

    def scheduled(self, sequence: Sequence, now_s: float) -> None:
        """Note that a step computes the sequence, for the first time."""
        sequence.times.scheduled_s = now_s
        self.queue_time_s.add(now_s - sequence.times.queued_s)

    def token(self, sequence: Sequence, now_s: float) -> None:
        """Note a token that was sampled for the sequence."""
        times = sequence.times
        if times.last_token_s:
            self.inter_token_s.add(now_s - times.last_token_s)
        elif not sequence.forced:
            self.prefill_time_s.add(now_s - times.scheduled_s)
        if not times.first_token_s:
            times.first_token_s = now_s
        times.last_token_s = now_s

    def finished(self, sequence: Sequence) -> None:
        """Note that the sequence has its last token."""
        times = sequence.times
        if times.first_token_s and not sequence.forced:
            self.decode_time_s.add(times.last_token_s - times.first_token_s)
