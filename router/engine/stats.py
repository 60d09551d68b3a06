"""An engine's counters, and the metric samples that a router makes from them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping

from cluster.reports import Sample, Samples
from router.engine.scheduling.scheduler import Scheduler
from router.engine.sequence import ScheduledChunk, Sequence
from router.moe.dispatch import Dispatcher
from router.observability import catalogue
from router.observability.catalogue import (
    LATENCY_BUCKETS_S,
    LAYER_BUCKETS_S,
    TOKEN_BUCKETS_S,
    Family,
)
from router.observability.histogram import Distribution, counts_of, histogram_of

LAYERS_KEPT = 8192


class EngineTally:
    """Times and tokens of one engine; :class:`router.engine.sequence.Times` are a sequence's times.

    Forced tokens of a sequence resumed after a failure do not count. ``latest_layers_s`` are the
    durations of the latest MoE layers.
    """

    def __init__(self) -> None:
        """Start every counter at 0."""
        self.queue_time_s = Distribution(LATENCY_BUCKETS_S)
        self.prefill_time_s = Distribution(LATENCY_BUCKETS_S)
        self.decode_time_s = Distribution(LATENCY_BUCKETS_S)
        self.inter_token_s = Distribution(TOKEN_BUCKETS_S)
        self.layer_time_s = Distribution(LAYER_BUCKETS_S)
        self.latest_layers_s: deque[float] = deque(maxlen=LAYERS_KEPT)
        self.steps = 0
        self.step_tokens = 0

    def step(self, chunks: Iterable[ScheduledChunk], now_s: float) -> None:
        """Count a step and its tokens."""
        self.steps += 1
        for chunk in chunks:
            self.step_tokens += chunk.end - chunk.start
            if not chunk.sequence.times.scheduled_at_s:
                self.scheduled(chunk.sequence, now_s)

    def scheduled(self, sequence: Sequence, now_s: float) -> None:
        """Count the first step of a sequence."""
        sequence.times.scheduled_at_s = now_s
        self.queue_time_s.add(now_s - sequence.times.queued_at_s)

    def token(self, sequence: Sequence, now_s: float) -> None:
        """Count a token that was sampled for the sequence."""
        times = sequence.times
        if times.last_token_at_s:
            self.inter_token_s.add(now_s - times.last_token_at_s)
        elif not sequence.forced:
            self.prefill_time_s.add(now_s - times.scheduled_at_s)
        if not times.first_token_at_s:
            times.first_token_at_s = now_s
        times.last_token_at_s = now_s

    def note_layers(self, times_s: Iterable[float]) -> None:
        """Count the durations of a step's MoE layers."""
        for took_s in times_s:
            self.latest_layers_s.append(took_s)
            self.layer_time_s.add(took_s)

    def finished(self, sequence: Sequence) -> None:
        """Count a sequence that has its last token."""
        times = sequence.times
        if times.first_token_at_s and not sequence.forced:
            self.decode_time_s.add(times.last_token_at_s - times.first_token_at_s)


class RouterSamples:
    """Reads a router's counters while the engine's thread keeps counting."""

    def __init__(
        self,
        model: str,
        tally: EngineTally,
        scheduler: Scheduler,
        dispatcher: Dispatcher,
        overflow: Mapping[tuple[int, int], int],
    ) -> None:
        """``model`` is the id of the model that the router serves.

        ``overflow`` maps (layer, expert) to the tokens for which the expert had no room.
        """
        self._labels = {"model_name": model}
        self._tally = tally
        self._scheduler = scheduler
        self._dispatcher = dispatcher
        self._overflow = overflow

    def __call__(self) -> Samples:
        """Return the current numbers."""
        labels, tally, dispatcher = self._labels, self._tally, self._dispatcher
        prefixes = self._scheduler.prefixes
        samples: dict[str, list[Sample]] = {
            family.name: [(family.exported, labels, float(value))]
            for family, value in (
                *self._gauges().items(),
                (catalogue.PREFIX_QUERIES, 0 if prefixes is None else prefixes.looked_up_tokens),
                (catalogue.PREFIX_HITS, 0 if prefixes is None else prefixes.hit_tokens),
                (catalogue.STEPS, tally.steps),
                (catalogue.STEP_TOKENS, tally.step_tokens),
            )
        }
        for family, values in (
            (catalogue.QUEUE_TIME, tally.queue_time_s),
            (catalogue.PREFILL_TIME, tally.prefill_time_s),
            (catalogue.DECODE_TIME, tally.decode_time_s),
            (catalogue.INTER_TOKEN, tally.inter_token_s),
            (catalogue.LAYER_TIME, tally.layer_time_s),
        ):
            samples[family.name] = list(histogram_of(family, values, labels))
        for family, counts, by in (
            (catalogue.CALLS, dispatcher.calls, "transport"),
            (catalogue.RETRIES, dispatcher.retries, "reason"),
        ):
            # Copied in one operation, since the engine's thread may add a key.
            samples[family.name] = counts_of(family, dict(counts), labels, by)
        name = catalogue.OVERFLOW.exported
        samples[catalogue.OVERFLOW.name] = [
            (name, {**labels, "layer": str(layer_id), "expert": str(expert_id)}, float(count))
            for (layer_id, expert_id), count in dict(self._overflow).items()
        ]
        now_s = time.monotonic()
        return Samples(now_s, samples, dispatcher.times.slowness(now_s))

    def _gauges(self) -> dict[Family, float]:
        scheduler = self._scheduler
        num_pages = scheduler.num_pages
        return {
            catalogue.RUNNING: len(scheduler.running),
            catalogue.PARKED: sum(bool(s.awaited) for s in scheduler.running.copy()),
            catalogue.WAITING: len(scheduler.waiting),
            catalogue.KV_CACHE_USAGE: 1 - scheduler.num_free_pages / num_pages,
        }
