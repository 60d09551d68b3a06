"""A process's numbers as plain samples, and a router's from what it counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from cluster.reports import Sample, Samples
from router.engine.engine import Engine
from router.engine.scheduler import Scheduler
from router.moe.dispatch import Dispatcher
from router.moe.layer import RemoteExchange
from router.observability import catalogue
from router.observability.catalogue import Family
from router.observability.histogram import Distribution


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


class RouterSamples:
    """Reads a router's counters; the engine's thread goes on meanwhile."""

    def __init__(
        self,
        model: str,
        engine: Engine,
        scheduler: Scheduler,
        exchange: RemoteExchange,
        dispatcher: Dispatcher,
    ) -> None:
        """``model`` is the id of the model that the router serves."""
        self._labels = {"model_name": model}
        self._engine = engine
        self._scheduler = scheduler
        self._exchange = exchange
        self._dispatcher = dispatcher

    def __call__(self) -> Samples:
        """Return the numbers of this moment."""
        labels = self._labels
        tally, dispatcher = self._engine.tally, self._dispatcher
        numbers = {**self._gauges(), catalogue.STEPS: tally.steps}
        numbers[catalogue.STEP_TOKENS] = tally.step_tokens
        found: dict[str, list[Sample]] = {
            family.name: [(family.exported, labels, float(value))]
            for family, value in numbers.items()
        }
        for family, values in (
            (catalogue.QUEUE_TIME, tally.queue_time_s),
            (catalogue.PREFILL_TIME, tally.prefill_time_s),
            (catalogue.DECODE_TIME, tally.decode_time_s),
            (catalogue.INTER_TOKEN, tally.inter_token_s),
            (catalogue.LAYER_TIME, self._exchange.layer_time_s),
        ):
            found[family.name] = list(histogram_of(family, values, labels))
        for family, counts, by in (
            (catalogue.CALLS, dispatcher.calls, "transport"),
            (catalogue.RETRIES, dispatcher.retries, "reason"),
        ):
            # A copy at one stroke: the engine's thread may add a key.
            found[family.name] = counts_of(family, dict(counts), labels, by)
        name = catalogue.OVERFLOW.exported
        found[catalogue.OVERFLOW.name] = [
            (name, {**labels, "layer": str(layer_id), "expert": str(expert_id)}, float(count))
            for (layer_id, expert_id), count in dict(self._exchange.overflow).items()
        ]
        return Samples(time.monotonic(), found)

    def _gauges(self) -> dict[Family, float]:
        scheduler = self._scheduler
        num_pages = scheduler.num_pages
        return {
            catalogue.RUNNING: len(scheduler.running),
            catalogue.PARKED: sum(bool(s.awaited) for s in scheduler.running.copy()),
            catalogue.WAITING: len(scheduler.waiting),
            catalogue.KV_CACHE_USAGE: 1 - scheduler.num_free_pages / num_pages,
        }
