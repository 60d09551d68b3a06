"""What the engine's thread counts: plain numbers, without a lock and without a metrics library.

Only the engine's thread writes; another may read at any time, and sees each number as it was a
moment ago.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from cluster.reports import Sample
from router.observability.catalogue import Family


class Distribution:
    """How many values fell under each bound, and their sum."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
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


def counts_of(
    family: Family, counts: Mapping[str, float], labels: Mapping[str, str], by: str
) -> list[Sample]:
    """Return a counter's samples, one for each value of the label ``by``."""
    name = family.exported
    return [(name, {**labels, by: key}, float(value)) for key, value in counts.items()]


def histogram_of(
    family: Family, values: Distribution, labels: Mapping[str, str]
) -> Iterable[Sample]:
    """Yield a histogram's samples: its buckets, count and sum."""
    cumulative = values.cumulative()
    bounds = [*map(repr, values.bounds), "+Inf"]
    for bound, count in zip(bounds, cumulative, strict=True):
        yield f"{family.name}_bucket", {**labels, "le": bound}, float(count)
    yield f"{family.name}_count", labels, float(cumulative[-1])
    yield f"{family.name}_sum", labels, values.total
