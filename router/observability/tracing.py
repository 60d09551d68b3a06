"""Spans of gateways and routers, as Serve's tracing samples and exports them.

A gateway takes a request's W3C context from HTTP headers or gRPC metadata; Serve brings it from the
gateway to the router. ``docs/observability.md`` explains how to switch tracing on. The spans are a
request in the gateway; its queue, prefill and decode in the router; the MoE layers of its first
steps. Frames bring the context of a layer to the expert actors (:mod:`experts.tracing`). A request
that is not sampled has no spans and costs no memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import context, trace
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.errors import ExpertMeshError
from experts.tracing import wall_ns
from router.messages.prediction import PredictionRequest
from router.messages.receipts import DeliveredTokens
from router.messages.request import GenerationRequest

STEPS_IN_DETAIL = 4
"""The number of a request's steps with spans for their layers; all steps would make thousands."""


_PARENT = "traceparent"
_W3C = TraceContextTextMapPropagator()


def continue_trace(headers: Mapping[str, str]) -> None:
    """Let the current task go on in the trace that a request's headers or metadata name, if any.

    The keys are in lower case.
    """
    if _PARENT in headers:
        context.attach(_W3C.extract(headers))


def _tracer() -> trace.Tracer:
    return trace.get_tracer("expertmesh")


@contextmanager
def gateway_span(request: GenerationRequest, receipts: DeliveredTokens) -> Iterator[Span]:
    """Yield the span of a request in the gateway, a span without a recording if it is not sampled.

    It does not become the current span, since a generator runs in the contexts of its callers.
    """
    span = _tracer().start_span("expertmesh.request")
    if not span.is_recording():
        yield trace.INVALID_SPAN
        return
    span.set_attributes(_attributes_of(request))
    try:
        yield span
    except Exception as error:
        span.set_status(_failed(error))
        raise
    finally:
        received = receipts.received()
        span.set_attribute("gen_ai.usage.output_tokens", sum(len(r.token_ids) for r in received))
        span.set_attribute("expertmesh.exact", all(r.exact for r in received))
        span.end()


@contextmanager
def prediction_span(request: PredictionRequest) -> Iterator[Span]:
    """Yield the span of a prediction in the gateway, without a recording if it is not sampled."""
    span = _tracer().start_span("expertmesh.prediction")
    if not span.is_recording():
        yield trace.INVALID_SPAN
        return
    attributes: dict[str, str | int] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": request.model,
        "expertmesh.rows": request.num_rows,
    }
    span.set_attributes(attributes)
    try:
        yield span
    except Exception as error:
        span.set_status(_failed(error))
        raise
    finally:
        span.end()


def as_current(span: Span) -> AbstractContextManager[Span]:
    """Make a span the current span within a ``with`` block, which must not await or yield."""
    if not span.is_recording():
        return nullcontext(span)
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


def _attributes_of(request: GenerationRequest) -> dict[str, str | int]:
    return {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": request.model,
        "gen_ai.request.choice.count": request.sampling.n,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
    }


def _failed(error: BaseException) -> Status:
    # Errors of other libraries may quote a prompt.
    is_own = isinstance(error, ExpertMeshError)
    return Status(StatusCode.ERROR, str(error) if is_own else type(error).__name__)


class RequestTrace:
    """A sampled request in the router; only the engine's thread uses it once it is made."""

    def __init__(self, parent: Span) -> None:
        """``parent`` is the parent of the router's spans."""
        self.parent = parent
        self._context = trace.set_span_in_context(parent)
        self._steps_left = STEPS_IN_DETAIL

    @classmethod
    def of_call(cls) -> RequestTrace | None:
        """Return the trace of the call that is being served, or ``None`` if it is not sampled."""
        span = trace.get_current_span()
        return cls(span) if span.is_recording() else None

    def take_step(self) -> bool:
        """Count a step; returns whether it has spans for its layers."""
        self._steps_left -= 1
        return self._steps_left >= 0

    def ended(
        self,
        choice: int,
        num_generated: int,
        started_at_s: Mapping[str, float],
        error: ExpertMeshError | None = None,
    ) -> None:
        """Make a span for each phase of a choice that ends now; ``error`` is the reason it failed.

        ``started_at_s`` maps the phases, in their order, to their starts. The start is 0 for a
        phase that the choice did not reach.
        """
        now_s = time.monotonic()
        begun = [(phase, start_at_s) for phase, start_at_s in started_at_s.items() if start_at_s]
        ends_at_s = [*(start_at_s for _, start_at_s in begun[1:]), now_s]
        for (phase, start_at_s), until_s in zip(begun, ends_at_s, strict=True):
            span = _tracer().start_span(
                f"expertmesh.{phase}",
                self._context,
                attributes={
                    "expertmesh.choice": choice,
                    "expertmesh.generated_tokens": num_generated,
                },
                start_time=wall_ns(start_at_s),
            )
            if error is not None and until_s == now_s:
                span.set_status(_failed(error))
            span.end(wall_ns(until_s))


class StepTrace:
    """One engine step, as a span in the trace of one of its requests."""

    def __init__(self, traces: Sequence[RequestTrace], num_sequences: int, num_tokens: int) -> None:
        """Begin the step's span in the first of ``traces``; it links to the other traces."""
        self._span = _tracer().start_span(
            "expertmesh.step",
            trace.set_span_in_context(traces[0].parent),
            attributes={
                "expertmesh.sequences": num_sequences,
                "expertmesh.tokens": num_tokens,
            },
            links=[Link(linked.parent.get_span_context()) for linked in traces[1:]],
        )
        self._context = trace.set_span_in_context(self._span)

    def layer(self, layer_id: int) -> Span:
        """Begin the span of an MoE layer, which the caller ends."""
        return _tracer().start_span(
            "expertmesh.layer", self._context, attributes={"expertmesh.layer": layer_id}
        )

    def end(self) -> None:
        """End the step's span."""
        self._span.end()


def begin_step(
    traces: Iterable[RequestTrace], num_sequences: int, num_tokens: int
) -> StepTrace | None:
    """Begin a step's span; returns ``None`` where no request has a detailed step left.

    ``traces`` are those of the step's sequences; a request with several sequences counts once.
    """
    detailed = [request for request in dict.fromkeys(traces) if request.take_step()]
    return StepTrace(detailed, num_sequences, num_tokens) if detailed else None


def traceparent(of_span: SpanContext) -> str:
    """Return a span's context as the W3C's header ``traceparent``."""
    return (
        f"00-{format_trace_id(of_span.trace_id)}-{format_span_id(of_span.span_id)}"
        f"-{of_span.trace_flags:02x}"
    )
