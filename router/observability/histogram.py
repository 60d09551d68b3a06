"""Distributions that the engine's thread counts, without a lock and without a metrics library.

Only the engine's thread writes. Another thread may read at any time; its numbers may be a moment
old.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from cluster.reports import Sample
from router.observability.catalogue import Family


class Distribution:
    """The number of values under each bound, and the sum of all values."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds`` are upper bounds, ascending; a last bucket without a bound follows."""
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """Return the number of values up to each bound, then the number of all values."""
        return list(itertools.accumulate(self._counts))


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
