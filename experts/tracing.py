"""The spans of an expert actor, for deployments with Serve's tracing.

Serve sets up tracing in its own replicas, and an expert actor is no replica. Its controller passes
the exporter in Serve's environment variable, and a dispatch frame carries the trace context. The
start of a trace decides whether the trace is sampled. Without tracing nothing is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec import model_id_of
from cluster.wire.frames import DispatchFrame

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Tracer

EXPORTER_VARIABLE = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
"""Serve's variable: ``module:function`` of a function that returns span processors, or empty."""
TO_FILES = "experts.tracing:to_file"
"""The exporter where Serve's replicas export to files."""


def open_spans(actor_id: str, generation: int) -> BatchSpans | None:
    """Return the exporter of the actor's spans, or ``None`` without tracing.

    An exporter that cannot be imported raises its own error, as in Serve's replicas.
    """
    path = os.environ.get(EXPORTER_VARIABLE)
    if not path:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    module, _, name = path.replace(":", ".").rpartition(".")
    exporter = getattr(import_module(module), name)
    # An exporter to files takes the file's name.
    names = [f"expert_actor_{actor_id}_g{generation}_tracing.json"]
    provider = TracerProvider(ParentBased(ALWAYS_OFF))
    for processor in exporter(*names[: len(signature(exporter).parameters)]):
        provider.add_span_processor(processor)
    return BatchSpans(provider.get_tracer("expertmesh"), actor_id)


def to_file(name: str) -> list[SpanProcessor]:
    """Return an exporter to a file beside those that Serve's replicas write."""
    import ray
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    session = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray")
    session /= ray.get_runtime_context().get_session_name()
    folder = session / "logs" / "serve" / "spans"
    folder.mkdir(parents=True, exist_ok=True)
    return [SimpleSpanProcessor(ConsoleSpanExporter(out=(folder / name).open("a", buffering=1)))]


class BatchSpans:
    """Makes a span for each traced frame of a batch."""

    def __init__(self, tracer: Tracer, actor_id: str) -> None:
        """``tracer`` starts the spans, and its provider exports them."""
        self._tracer = tracer
        self._actor_id = actor_id

    def computed(self, batch: Sequence[tuple[DispatchFrame, float]], begun_at_s: float) -> None:
        """Export a span for each traced frame of a batch that ran from ``begun_at_s`` until now.

        Each frame has the time at which its wait began. Times are of the monotonic clock.
        """
        for frame, since_s in batch:
            if frame.traceparent is not None:
                self._export(frame, frame.traceparent, len(batch), since_s, begun_at_s)

    def _export(
        self,
        frame: DispatchFrame,
        traceparent: str,
        num_frames: int,
        since_s: float,
        begun_at_s: float,
    ) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            "expertmesh.experts",
            TraceContextTextMapPropagator().extract({"traceparent": traceparent}),
            attributes={
                "gen_ai.request.model": model_id_of(frame.model),
                "expertmesh.actor": self._actor_id,
                "expertmesh.layer": frame.layer_id,
                "expertmesh.experts": len(frame.expert_ids),
                "expertmesh.rows": frame.num_rows,
                "expertmesh.batch_frames": num_frames,
                "expertmesh.waited_s": begun_at_s - since_s,
            },
            start_time=wall_ns(begun_at_s),
        )
        span.end()


def wall_ns(at_s: float) -> int:
    """Return a time of the monotonic clock as OpenTelemetry's wall-clock nanoseconds."""
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)
