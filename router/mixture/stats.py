"""The counters of a mixture's router, and the metric samples that it makes of them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from cluster.reports import Sample, Samples
from router.mixture.queue import Work, WorkQueue
from router.moe.dispatch import Dispatcher
from router.observability import catalogue
from router.observability.catalogue import LATENCY_BUCKETS_S, LAYER_BUCKETS_S
from router.observability.histogram import Distribution, counts_of, histogram_of

LAYERS_KEPT = 8192


class MixtureTally:
    """Times and rows of one engine; written under the engine's lock.

    ``inexact_rows`` counts, by contract, the rows that were computed without an expert that the
    gate chose. ``latest_layers_s`` are the durations of the latest steps' layers.
    """

    def __init__(self) -> None:
        """Start every counter at 0."""
        self.queue_time_s = Distribution(LATENCY_BUCKETS_S)
        self.layer_time_s = Distribution(LAYER_BUCKETS_S)
        self.latest_layers_s: deque[float] = deque(maxlen=LAYERS_KEPT)
        self.inexact_rows: Counter[str] = Counter()
        self.steps = 0
        self.step_rows = 0

    def taken(self, works: Sequence[Work], now_s: float) -> None:
        """Count the first step of each request."""
        for work in works:
            if not work.begin and not work.awaited:
                self.queue_time_s.add(now_s - work.job.queued_at_s)

    def stepped(self, layer_times_s: Iterable[float], num_rows: int) -> None:
        """Count a step."""
        self.steps += 1
        self.step_rows += num_rows
        for took_s in layer_times_s:
            self.latest_layers_s.append(took_s)
            self.layer_time_s.add(took_s)


class MixtureSamples:
    """Reads a router's counters while its lanes go on counting."""

    def __init__(
        self, model: str, tally: MixtureTally, queue: WorkQueue, dispatchers: Sequence[Dispatcher]
    ) -> None:
        """``model`` is the mixture's id; each lane has one of the ``dispatchers``."""
        self._labels = {"model_name": model}
        self._tally = tally
        self._queue = queue
        self._dispatchers = dispatchers

    def __call__(self) -> Samples:
        """Return the current numbers."""
        labels, tally, queue = self._labels, self._tally, self._queue
        parked = {work.job for work in list(queue.parked)}
        waiting = {work.job for work in queue.ready()}
        samples: dict[str, list[Sample]] = {
            family.name: [(family.exported, labels, float(value))]
            for family, value in (
                (catalogue.RUNNING, len(queue.jobs) - len(waiting - parked)),
                (catalogue.PARKED, len(parked)),
                (catalogue.WAITING, len(waiting)),
                (catalogue.STEPS, tally.steps),
                (catalogue.STEP_TOKENS, tally.step_rows),
            )
        }
        for family, values in (
            (catalogue.QUEUE_TIME, tally.queue_time_s),
            (catalogue.LAYER_TIME, tally.layer_time_s),
        ):
            samples[family.name] = list(histogram_of(family, values, labels))
        for family, counts, by in (
            (catalogue.CALLS, self.calls(), "transport"),
            (catalogue.RETRIES, self.retries(), "reason"),
        ):
            samples[family.name] = counts_of(family, counts, labels, by)
        now_s = time.monotonic()
        # The lanes' dispatchers share what they measure.
        return Samples(now_s, samples, self._dispatchers[0].times.slowness(now_s))

    def calls(self) -> Counter[str]:
        """Return the frames of all lanes by transport."""
        return sum((Counter(dict(d.calls)) for d in self._dispatchers), Counter())

    def retries(self) -> Counter[str]:
        """Return the frames of all lanes that were sent again, by reason."""
        return sum((Counter(dict(d.retries)) for d in self._dispatchers), Counter())
