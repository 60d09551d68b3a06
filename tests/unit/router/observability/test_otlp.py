"""The exporter that is shipped: a collector gets the spans of a trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from router.observability.otlp import span_processors

LIMIT_S = 60.0
Received = SimpleQueue[tuple[str, bytes]]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """A collector on this host, which OpenTelemetry's own variable names."""
    received: Received = SimpleQueue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield received
        server.shutdown()


@pytest.mark.parametrize("count", [1, 3])
def test_a_collector_gets_all_spans(collector: Received, count: int) -> None:
    provider = TracerProvider()
    for processor in span_processors():
        provider.add_span_processor(processor)
    with provider.get_tracer("expertmesh").start_as_current_span("outer") as outer:
        for number in range(count - 1):
            provider.get_tracer("expertmesh").start_span(f"inner {number}").end()
    provider.shutdown()
    path, body = collector.get(timeout=LIMIT_S)
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == [*(f"inner {n}" for n in range(count - 1)), "outer"]
    span_id = outer.get_span_context().span_id.to_bytes(8, "big")
    assert [span.parent_span_id for span in spans] == [span_id] * (count - 1) + [b""]
