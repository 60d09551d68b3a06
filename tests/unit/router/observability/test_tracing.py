"""Spans of gateways and routers: what a sampled request tells, and that others tell nothing."""

from __future__ import annotations

import contextvars
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, StatusCode
from ray.serve.schema import TracingConfig

from cluster.errors import CancelledRequestError, OverloadedError
from cluster.wire.frames import DispatchFrame
from experts.tracing import EXPORTER_VARIABLE, TO_FILES, open_spans
from router.messages.receipts import DeliveredTokens
from router.messages.request import GenerationRequest, SamplingParams, TokenEvent
from router.observability.tracing import (
    STEPS_IN_DETAIL,
    RequestTrace,
    as_current,
    begin_step,
    continue_trace,
    gateway_span,
    traceparent,
)
from router.serve.controller import exporter_of
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster, greedy_request
from tests.span_keeper import SpanKeeper

PROMPT = range(5, 15)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> SpanKeeper:
    """Keep what the process would export."""
    keeper = SpanKeeper()
    monkeypatch.setattr(trace, "get_tracer", keeper.provider.get_tracer)
    return keeper


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    cluster = LocalCluster(folder)
    yield cluster
    cluster.close()


def run(cluster: LocalCluster, request: GenerationRequest, parent: Span | None) -> None:
    """Run a request to its end, in the trace of ``parent`` if there is one."""
    cluster.transport.frames.clear()
    cluster.engine.submit(request, None if parent is None else RequestTrace(parent))
    cluster.result(request)


def parents(spans: list[Any]) -> set[int]:
    return {span.parent.span_id for span in spans}


def test_a_sampled_request_tells_its_phases_and_its_first_steps(
    cluster: LocalCluster, spans: SpanKeeper
) -> None:
    root = spans.tracer.start_span("root")
    started_ns = time.time_ns()
    run(cluster, greedy_request("sampled", PROMPT, 8), root)
    took_ns = time.time_ns() - started_ns
    assert {span.context.trace_id for span in spans.told()} == {root.get_span_context().trace_id}

    phases = [spans.told(f"expertmesh.{name}") for name in ("queue", "prefill", "decode")]
    [queue], [prefill], [decode] = phases
    assert parents([queue, prefill, decode]) == {root.get_span_context().span_id}
    assert started_ns - 1e6 <= queue.start_time <= queue.end_time
    for before, after in ((queue, prefill), (prefill, decode)):
        assert abs(after.start_time - before.end_time) < 1e6
        assert after.end_time > after.start_time
    assert decode.end_time - queue.start_time <= took_ns + 1e6
    assert decode.attributes["expertmesh.generated_tokens"] == 8

    steps = spans.told("expertmesh.step")
    assert parents(steps) == parents(phases[0])
    assert [step.attributes["expertmesh.tokens"] for step in steps] == [
        len(PROMPT),
        *[1] * (STEPS_IN_DETAIL - 1),
    ]
    layers = spans.told("expertmesh.layer")
    ids = list(cluster.checkpoint.shape.layers)
    assert [one.attributes["expertmesh.layer"] for one in layers] == ids * STEPS_IN_DETAIL
    assert parents(layers) == {step.context.span_id for step in steps}
    # Frames of the steps in detail say which layer's span they are under, the others nothing.
    told = [frame.traceparent for frame in cluster.transport.frames]
    traced = [context for context in told if context is not None]
    assert told == traced + [None] * (len(told) - len(traced))
    assert set(traced) == {traceparent(layer.context) for layer in layers}
    assert len(traced) < len(told)


def test_a_request_that_is_not_sampled_tells_nothing(
    cluster: LocalCluster, spans: SpanKeeper
) -> None:
    run(cluster, greedy_request("other", PROMPT, 3), None)
    assert spans.told() == []
    assert {frame.traceparent for frame in cluster.transport.frames} == {None}
    assert RequestTrace.of_call() is None
    with as_current(trace.INVALID_SPAN):
        assert RequestTrace.of_call() is None
    with as_current(root := spans.tracer.start_span("root")):
        of_call = RequestTrace.of_call()
        assert of_call is not None
        assert of_call.parent is root


def test_a_step_of_several_sampled_requests_is_in_one_trace_and_linked_from_it(
    spans: SpanKeeper,
) -> None:
    first, second = spans.tracer.start_span("first"), spans.tracer.start_span("second")
    traces = [RequestTrace(first), RequestTrace(second)]
    assert begin_step([], 1, 2) is None
    step = begin_step(traces, 3, 6)
    assert step is not None
    step.end()
    [told] = spans.told("expertmesh.step")
    assert told.parent == first.get_span_context()
    assert [link.context for link in told.links] == [second.get_span_context()]
    assert (told.attributes["expertmesh.sequences"], told.attributes["expertmesh.tokens"]) == (3, 6)


@pytest.mark.parametrize("num_begun", [1, 2, 3])
def test_what_fails_says_so_where_it_was(spans: SpanKeeper, num_begun: int) -> None:
    now_s = time.monotonic()
    begun = {
        name: now_s - 3 + place if place < num_begun else 0.0
        for place, name in enumerate(("queue", "prefill", "decode"))
    }
    error = CancelledRequestError("the request was cancelled")
    RequestTrace(spans.tracer.start_span("root")).ended(0, 0, begun, error)
    told = spans.told()
    names = [f"expertmesh.{name}" for name in begun]
    assert [span.name for span in told] == names[:num_begun]
    codes = [span.status.status_code for span in told]
    assert codes == [StatusCode.UNSET] * (num_begun - 1) + [StatusCode.ERROR]
    assert "cancelled" in told[-1].status.description


def asked() -> GenerationRequest:
    sampling = SamplingParams(max_tokens=9, n=2)
    return GenerationRequest("r", "m", (1, 2, 3), sampling, time.monotonic() + 60)


def test_the_gateways_span_is_under_serves_and_counts_tokens(spans: SpanKeeper) -> None:
    root = spans.tracer.start_span("serve")
    receipts = DeliveredTokens(asked())
    with as_current(root), gateway_span(asked(), receipts) as span:
        assert trace.get_current_span() is root
        with as_current(span):
            assert trace.get_current_span() is span
        receipts.take(TokenEvent(0, (7, 8)))
        receipts.take(TokenEvent(1, (9,), exact=False))
    [told] = spans.told()
    assert told.parent == root.get_span_context()
    assert told.attributes == {
        "gen_ai.request.id": "r",
        "gen_ai.request.model": "m",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "expertmesh.exact": False,
    }
    assert told.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("error", "said"),
    [(OverloadedError("full", "queue", 1.0), "full"), (ValueError("the prompt"), "ValueError")],
)
def test_a_failed_request_says_why_but_nothing_of_its_prompt(
    spans: SpanKeeper, error: Exception, said: str
) -> None:
    with as_current(spans.tracer.start_span("serve")), pytest.raises(type(error)):
        fail(error)
    [told] = spans.told()
    assert told.status.status_code is StatusCode.ERROR
    assert said in told.status.description
    assert "prompt" not in told.status.description
    assert told.events == ()


def fail(error: Exception) -> None:
    with gateway_span(asked(), DeliveredTokens(asked())):
        raise error


@pytest.mark.parametrize("is_sampled", [False, True])
def test_a_request_goes_on_in_the_trace_that_its_headers_name(
    spans: SpanKeeper, is_sampled: bool
) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-0{is_sampled:d}"}

    def ask() -> None:
        continue_trace({"authorization": "Bearer x"})
        continue_trace(headers)
        with gateway_span(asked(), DeliveredTokens(asked())) as span:
            assert span.is_recording() == is_sampled

    contextvars.copy_context().run(ask)
    found = [(f"{s.parent.trace_id:032x}", f"{s.parent.span_id:016x}") for s in spans.told()]
    assert found == [(trace_id, parent_id)] * is_sampled


@pytest.mark.parametrize(
    ("enabled", "path", "expected"),
    [(True, "a.b:c", "a.b:c"), (True, "", "experts.tracing:to_file"), (False, "a.b:c", "")],
)
def test_actors_export_as_serves_configuration_says(
    enabled: bool, path: str, expected: str
) -> None:
    config = TracingConfig(enabled=enabled, exporter_import_path=path, sampling_ratio=0.5)
    assert exporter_of(config) == expected


def exporters() -> list[SpanProcessor]:
    """What an actor of this process imports; each time the same."""
    return [SimpleSpanProcessor(EXPORTED)]


EXPORTED = InMemorySpanExporter()


def frame_of(
    expert_ids: tuple[int, ...], counts: tuple[int, ...], traceparent: str | None
) -> DispatchFrame:
    given = expert_ids, counts, sum(counts), (4,), "float32", b"", 0.0
    return DispatchFrame(1, "m", 2, *given, traceparent=traceparent)


def test_an_actor_exports_what_was_sampled_where_its_frame_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(EXPORTER_VARIABLE, raising=False)
    assert open_spans("pool-0", 1) is None
    monkeypatch.setenv(EXPORTER_VARIABLE, f"{__name__}:exporters")
    spans = open_spans("pool-0", 1)
    assert spans is not None
    contexts = [None, f"00-{7:032x}-{8:016x}-01", f"00-{9:032x}-{8:016x}-00"]
    frames = [frame_of((4, 5), (1, 2), context) for context in contexts]
    now_s = time.monotonic()
    spans.computed([(frame, now_s - 2.0) for frame in frames], now_s - 1.0)
    [told] = EXPORTED.get_finished_spans()
    assert (told.context.trace_id, told.parent.span_id) == (7, 8)
    assert told.attributes == {
        "gen_ai.request.model": "m",
        "expertmesh.actor": "pool-0",
        "expertmesh.layer": 2,
        "expertmesh.experts": 2,
        "expertmesh.rows": 3,
        "expertmesh.batch_frames": 3,
        "expertmesh.waited_s": pytest.approx(1.0),
    }
    assert told.end_time - told.start_time >= 1e9
    assert abs(time.time_ns() - told.end_time) < 10e9


def test_an_actors_spans_are_written_beside_those_of_replicas(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = SimpleNamespace(get_session_name=lambda: "session_1")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv(EXPORTER_VARIABLE, TO_FILES)
    spans = open_spans("pool-0", 3)
    assert spans is not None
    frame = frame_of((4,), (1,), f"00-{7:032x}-{8:016x}-01")
    spans.computed([(frame, time.monotonic())], time.monotonic())
    folder = tmp_path / "ray" / "session_1" / "logs" / "serve" / "spans"
    text = (folder / "expert_actor_pool-0_g3_tracing.json").read_text("utf-8")
    assert json.loads(text)["parent_id"] == f"0x{8:016x}"
