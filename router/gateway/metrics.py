"""Prometheus metrics of one gateway, in a registry of its own.

Names follow vLLM's under the prefix ``expertmesh_``. Labels are bounded: served models, the two
surfaces, error codes, and the actors that live at the moment of a scrape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.errors import Code, ExpertMeshError
from cluster.status import ClusterStatus

OK = "ok"
_LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip


class Metrics:
    """Counts requests and tokens and keeps what the controller last said."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "expertmesh_requests", "Requests by outcome.", ["surface", "code"], registry=registry
        )
        self._running = Gauge(
            "expertmesh_num_requests_running",
            "Requests that are generating.",
            ["model_name"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "expertmesh_prompt_tokens", "Prompt tokens taken.", ["model_name"], registry=registry
        )
        self._generation_tokens = Counter(
            "expertmesh_generation_tokens", "Tokens sent.", ["model_name"], registry=registry
        )
        self._inexact_tokens = Counter(
            "expertmesh_inexact_tokens",
            "Tokens sent in pieces that are flagged as not exact, by on_expert_loss.",
            ["model_name", "reason"],
            registry=registry,
        )
        self._slow_readers = Counter(
            "expertmesh_slow_readers",
            "Streams that were ended because their clients did not read them.",
            ["surface"],
            registry=registry,
        )
        self._first_token = Histogram(
            "expertmesh_time_to_first_token_seconds",
            "From a checked request to its first token.",
            ["model_name"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._latency = Histogram(
            "expertmesh_e2e_request_latency_seconds",
            "From a checked request to its last token.",
            ["model_name"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._version = Gauge(
            "expertmesh_placement_version", "Version of the placement.", registry=registry
        )
        self._missing = Gauge(
            "expertmesh_missing_experts", "Experts without a live copy.", registry=registry
        )
        self._loop_age = Gauge(
            "expertmesh_controller_loop_age_seconds",
            "Time since the controller last finished a look at an expert actor.",
            registry=registry,
        )
        self._actor_tokens = Gauge(
            "expertmesh_actor_tokens",
            "Token rows computed by each live expert actor.",
            ["actor_id"],
            registry=registry,
        )

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
        """Count a request that begins to generate; :meth:`ended` must follow."""
        self._running.labels(model_id).inc()
        self._prompt_tokens.labels(model_id).inc(prompt_tokens)

    def ended(self, model_id: str, seconds: float) -> None:
        """Count a request that generates no longer, ``seconds`` after its start."""
        self._running.labels(model_id).dec()
        self._latency.labels(model_id).observe(seconds)

    def first_token(self, model_id: str, seconds: float) -> None:
        """Record the time to a request's first token."""
        self._first_token.labels(model_id).observe(seconds)

    def tokens(self, model_id: str, count: int) -> None:
        """Count generated tokens."""
        self._generation_tokens.labels(model_id).inc(count)

    def inexact_tokens(self, model_id: str, reason: str, count: int) -> None:
        """Count generated tokens that are not exact; ``reason`` is what the request asked for."""
        self._inexact_tokens.labels(model_id, reason).inc(count)

    def slow_reader(self, surface: str) -> None:
        """Count a stream that was ended because its client did not read it."""
        self._slow_readers.labels(surface).inc()

    def show_loop_age(self, loop_age_s: float | None) -> None:
        """Set the gauge of the controller's last loop; ``None`` before the first word from it."""
        self._loop_age.set(math.nan if loop_age_s is None else loop_age_s)

    def show_cluster(self, status: ClusterStatus) -> None:
        """Set the gauges to what the controller says; actors that are gone vanish."""
        self._version.set(status.placement_version)
        self._missing.set(status.missing_experts)
        self._actor_tokens.clear()
        for actor in status.actors:
            self._actor_tokens.labels(actor.actor_id).set(actor.tokens)

    def hide_cluster(self) -> None:
        """Forget what the controller said, since it no longer answers."""
        self._version.set(math.nan)
        self._missing.set(math.nan)
        self._actor_tokens.clear()

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
