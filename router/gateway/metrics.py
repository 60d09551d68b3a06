"""The metrics of one gateway, in a Prometheus registry of its own.

``router/observability/catalogue.py`` has their names; ``router/observability/exposition.py`` writes
them out with the metrics of all other processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.errors import Code, ExpertMeshError
from cluster.reports import Samples
from router.messages.prediction import PredictionRequest
from router.messages.request import GenerationRequest
from router.observability import catalogue
from router.observability.catalogue import LATENCY_BUCKETS_S, Family

access_log = logging.getLogger("expertmesh.access")
http_request_id: ContextVar[str] = ContextVar("http_request_id", default="")
"""The id of an HTTP request that its client knows, for the log."""
OK = "ok"
KeyTokens = Literal["prompt", "generated", "rows"]
M = TypeVar("M", Counter, Gauge, Histogram)


class Metrics:
    """Counts requests, tokens and rows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._metric(Counter, catalogue.REQUESTS)
        self._in_flight = self._metric(Gauge, catalogue.IN_FLIGHT)
        self._success = self._metric(Counter, catalogue.SUCCESS)
        self._prompt_tokens = self._metric(Counter, catalogue.PROMPT_TOKENS)
        self._generation_tokens = self._metric(Counter, catalogue.GENERATION_TOKENS)
        self._inexact_tokens = self._metric(Counter, catalogue.INEXACT_TOKENS)
        self._prediction_rows = self._metric(Counter, catalogue.PREDICTION_ROWS)
        self._router_calls = self._metric(Counter, catalogue.ROUTER_CALLS)
        self._inexact_rows = self._metric(Counter, catalogue.INEXACT_ROWS)
        self._slow_readers = self._metric(Counter, catalogue.SLOW_READERS)
        self._refused_callers = self._metric(Counter, catalogue.REFUSED_CALLERS)
        self._key_requests = self._metric(Counter, catalogue.KEY_REQUESTS)
        self._key_tokens = self._metric(Counter, catalogue.KEY_TOKENS)
        self._key_refusals = self._metric(Counter, catalogue.KEY_REFUSALS)
        buckets = LATENCY_BUCKETS_S
        self._first_token = self._metric(Histogram, catalogue.FIRST_TOKEN, buckets=buckets)
        self._latency = self._metric(Histogram, catalogue.LATENCY, buckets=buckets)

    def _metric(self, kind: type[M], family: Family, **options: Any) -> M:
        """Register a metric with its labels; the exposition adds ``replica``."""
        labels = [label for label in family.labels if label != "replica"]
        return kind(family.name, family.help, labels, registry=self._registry, **options)

    def finished(self, surface: str, code: Code | None) -> None:
        """Count a request's outcome; ``None`` is success."""
        self._requests.labels(surface, OK if code is None else code.value).inc()

    @contextmanager
    def refusals(self, surface: str) -> Iterator[None]:
        """Count a request that is refused while the block reads and checks it."""
        try:
            yield
        except ExpertMeshError as error:
            self.finished(surface, error.code)
            raise

    def started(self, model_id: str, prompt_tokens: int) -> None:
        """Count a request that starts to generate; :meth:`ended` must follow."""
        self._in_flight.labels(model_id).inc()
        self._prompt_tokens.labels(model_id).inc(prompt_tokens)

    def ended(
        self,
        request: GenerationRequest | PredictionRequest,
        surface: str,
        code: Code | None,
        seconds: float,
    ) -> None:
        """Count a request that has ended, ``seconds`` after its start; ``None`` is success.

        Where ``gateway.access_log`` asks for it, the request has a line in the log.
        """
        model_id, outcome = request.model, OK if code is None else code.value
        self._in_flight.labels(model_id).dec()
        self._latency.labels(model_id).observe(seconds)
        self.finished(surface, code)
        known_id, caller = http_request_id.get() or request.request_id, request.tenant or "anybody"
        told = (surface, known_id, model_id, caller, outcome, 1e3 * seconds)
        access_log.info("%s request %s for %s by %s: %s after %.0f ms", *told)

    def first_token(self, model_id: str, seconds: float) -> None:
        """Record the time to a request's first token."""
        self._first_token.labels(model_id).observe(seconds)

    def token_counter(self, model_id: str) -> Callable[[float], None]:
        """Return the function that counts generated tokens, called with their number."""
        return self._generation_tokens.labels(model_id).inc

    def choice_finished(self, model_id: str, reason: str) -> None:
        """Count a choice that has finished; ``reason`` is its ``finish_reason``."""
        self._success.labels(model_id, reason).inc()

    def inexact_tokens(self, model_id: str, reason: str, count: int) -> None:
        """Count generated tokens that are not exact; ``reason`` is the request's contract."""
        self._inexact_tokens.labels(model_id, reason).inc(count)

    def prediction_started(self, model_id: str, num_rows: int) -> None:
        """Count a prediction that starts; :meth:`ended` must follow."""
        self._in_flight.labels(model_id).inc()
        self._prediction_rows.labels(model_id).inc(num_rows)

    def router_call(self, model_id: str, transport: str) -> None:
        """Count a call of a router; ``transport`` is ``link`` or ``serve``."""
        self._router_calls.labels(model_id, transport).inc()

    def inexact_rows(self, model_id: str, reason: str, count: int) -> None:
        """Count the rows of a reply that is not exact; ``reason`` is the request's contract."""
        self._inexact_rows.labels(model_id, reason).inc(count)

    def slow_reader(self, surface: str) -> None:
        """Count a stream that was ended because its client did not read it."""
        self._slow_readers.labels(surface).inc()

    def refused_caller(self, surface: str, reason: str) -> None:
        """Count a request that was refused for want of a key or a role."""
        self._refused_callers.labels(surface, reason).inc()

    def key_request(self, name: str) -> None:
        """Count a request by the name of its key."""
        self._key_requests.labels(name).inc()

    def key_tokens(self, name: str, kind: KeyTokens, count: int) -> None:
        """Count what a call of a key has used."""
        self._key_tokens.labels(name, kind).inc(count)

    def key_refused(self, name: str, limit: str) -> None:
        """Count a call that was refused by a limit of its key."""
        self._key_refusals.labels(name, limit).inc()

    def samples(self) -> Samples:
        """Return all metrics as plain samples, without the start time of each series."""
        return Samples(
            time.monotonic(),
            {
                family.name: [
                    (sample.name, sample.labels, sample.value)
                    for sample in family.samples
                    if not sample.name.endswith("_created")
                ]
                for family in self._registry.collect()
            },
        )
