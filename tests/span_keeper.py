"""Spans as tests look at them: in memory, or of a cluster's processes in files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer


class SpanKeeper:
    """Keeps the spans that have ended, of ``tracer`` and others of ``provider``."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self.provider.get_tracer("test")

    def told(self, name: str | None = None) -> list[Any]:
        """Return the spans of a name, or all, in the order in which they ended."""
        return [s for s in self._exporter.get_finished_spans() if name in (None, s.name)]


FOLDER_VARIABLE = "EXPERTMESH_TEST_SPANS"


def to_files() -> list[SpanProcessor]:
    """Return what the processes of a test's cluster export by: lines of JSON, a file for each."""
    path = Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl"
    exporter = ConsoleSpanExporter(
        out=path.open("a", encoding="utf-8"),
        formatter=lambda span: span.to_json(indent=None) + "\n",
    )
    return [SimpleSpanProcessor(exporter)]


@dataclass(frozen=True, slots=True)
class FiledSpan:
    """A span that a process of the cluster exported; ids are as the W3C's header has them."""

    name: str
    pid: int
    trace_id: str
    span_id: str
    parent_id: str | None
    attributes: dict[str, Any]


def read_spans(folder: Path) -> list[FiledSpan]:
    """Return all spans that have been exported to a folder."""
    return [
        _filed(json.loads(line), int(path.stem))
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]


def _filed(told: dict[str, Any], pid: int) -> FiledSpan:
    context, parent_id = told["context"], told["parent_id"]
    return FiledSpan(
        told["name"],
        pid,
        context["trace_id"].removeprefix("0x"),
        context["span_id"].removeprefix("0x"),
        None if parent_id is None else parent_id.removeprefix("0x"),
        told["attributes"],
    )
