"""Spans of an expert actor: its part of a trace, where Serve's tracing is on.

Serve sets tracing up in its own replicas. An expert actor is none: its controller tells it the
exporter by Serve's environment variable, and a dispatch frame brings the context that it belongs
to. Whether a trace is kept was decided where it began. Where tracing is off nothing is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from cluster.wire.frames import DispatchFrame

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

EXPORTER_VARIABLE = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
"""Serve's own: a function that returns span processors, as ``module:function``; empty is off."""
TO_FILES = "ray.serve._private.tracing_utils:default_tracing_exporter"
"""Serve's own exporter, the one that takes an argument: a file's name."""


def open_spans(actor_id: str, generation: int) -> BatchSpans | None:
    """Return where the actor tells of its batches, or ``None`` where the deployment does not trace.

    Raises what importing the exporter raises, as Serve's replicas do then.
    """
    path = os.environ.get(EXPORTER_VARIABLE)
    if not path:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    module, _, name = path.replace(":", ".").rpartition(".")
    exporter = getattr(import_module(module), name)
    file_name = [f"expert_actor_{actor_id}_g{generation}_tracing.json"]
    provider = TracerProvider(ParentBased(ALWAYS_OFF))
    for processor in exporter(*file_name if path == TO_FILES else []):
        provider.add_span_processor(processor)
    return BatchSpans(provider.get_tracer("expertmesh"), actor_id)


class BatchSpans:
    """Makes a span for each traced frame of a batch."""

    def __init__(self, tracer: Tracer, actor_id: str) -> None:
        """``tracer`` exports by what it was made from."""
        self._tracer = tracer
        self._actor_id = actor_id

    def computed(self, batch: Sequence[tuple[DispatchFrame, float]], begun_s: float) -> None:
        """Tell of the batch that was computed from ``begun_s`` until now.

        Each frame comes with the time since when it waited; times are the monotonic clock's.
        """
        for frame, since_s in batch:
            if frame.traceparent is not None:
                self._tell(frame, frame.traceparent, len(batch), since_s, begun_s)

    def _tell(
        self,
        frame: DispatchFrame,
        traceparent: str,
        num_frames: int,
        since_s: float,
        begun_s: float,
    ) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            "expertmesh.experts",
            TraceContextTextMapPropagator().extract({"traceparent": traceparent}),
            attributes={
                "gen_ai.request.model": frame.model,
                "expertmesh.actor": self._actor_id,
                "expertmesh.layer": frame.layer_id,
                "expertmesh.experts": len(frame.expert_ids),
                "expertmesh.rows": frame.num_rows,
                "expertmesh.batch_frames": num_frames,
                "expertmesh.waited_s": begun_s - since_s,
            },
            start_time=wall_ns(begun_s),
        )
        span.end()


def wall_ns(monotonic_s: float) -> int:
    """Return a time of the monotonic clock as OpenTelemetry has times."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
