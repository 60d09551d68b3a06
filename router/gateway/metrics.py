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
from typing import Any, TypeVar

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
M = TypeVar("M", Counter, Gauge, Histogram)
_COUNTERS = (
    catalogue.REQUESTS, catalogue.SUCCESS, catalogue.PROMPT_TOKENS, catalogue.GENERATION_TOKENS,
    catalogue.INEXACT_TOKENS, catalogue.PREDICTION_ROWS, catalogue.ROUTER_CALLS,
    catalogue.INEXACT_ROWS, catalogue.SLOW_READERS, catalogue.REFUSED_CALLERS,
    catalogue.KEY_REQUESTS, catalogue.KEY_TOKENS, catalogue.KEY_REFUSALS,
)  # fmt: skip


class Metrics:
    """Counts requests, tokens and rows."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {family: self._metric(Counter, family) for family in _COUNTERS}
        self._in_flight = self._metric(Gauge, catalogue.IN_FLIGHT)
        buckets = LATENCY_BUCKETS_S
        self._first_token = self._metric(Histogram, catalogue.FIRST_TOKEN, buckets=buckets)
        self._latency = self._metric(Histogram, catalogue.LATENCY, buckets=buckets)

    def _metric(self, kind: type[M], family: Family, **options: Any) -> M:
        """Register a metric with its labels; the exposition adds ``replica``."""
        labels = [label for label in family.labels if label != "replica"]
        return kind(family.name, family.help, labels, registry=self._registry, **options)

    def count(self, family: Family, *labels: str, by: float = 1) -> None:
        """Count by a counter of the catalogue, whose labels come in its order."""
        self._counters[family].labels(*labels).inc(by)

    @contextmanager
    def refusals(self, surface: str) -> Iterator[None]:
        """Count a request that is refused while the block reads and checks it."""
        try:
            yield
        except ExpertMeshError as error:
            self.count(catalogue.REQUESTS, surface, error.code.value)
            raise

    def refused_caller(self, surface: str, reason: str) -> None:
        """Count a request that was refused for want of a key or a role."""
        self.count(catalogue.REFUSED_CALLERS, surface, reason)

    def started(self, family: Family, model_id: str, amount: int) -> None:
        """Count a request that starts, by its tokens or rows; :meth:`ended` must follow."""
        self._in_flight.labels(model_id).inc()
        self.count(family, model_id, by=amount)

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
        self.count(catalogue.REQUESTS, surface, outcome)
        known_id, caller = http_request_id.get() or request.request_id, request.tenant or "anybody"
        told = (surface, known_id, model_id, caller, outcome, 1e3 * seconds)
        access_log.info("%s request %s for %s by %s: %s after %.0f ms", *told)

    def first_token(self, model_id: str, seconds: float) -> None:
        """Record the time to a request's first token."""
        self._first_token.labels(model_id).observe(seconds)

    def token_counter(self, model_id: str) -> Callable[[float], None]:
        """Return the function that counts generated tokens, called with their number."""
        return self._counters[catalogue.GENERATION_TOKENS].labels(model_id).inc

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
