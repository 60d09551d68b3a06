"""An exporter for Serve's tracing: sends spans to a collector by OTLP over HTTP.

Name it in the deployment file: ``exporter_import_path: router.observability.otlp:span_processors``.
It needs the extra ``tracing``. OpenTelemetry's own environment variables, such as
``OTEL_EXPORTER_OTLP_ENDPOINT``, configure it.
"""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def span_processors() -> list[SpanProcessor]:
    """Return a processor that sends spans in the background; without a collector they are lost."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
