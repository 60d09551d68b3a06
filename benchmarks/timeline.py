"""What a trace becomes: a Chrome/Perfetto file of all of it, and an SVG picture of a few layers.

Pure functions of spans. All processes of a host read one clock (``time.perf_counter``), so their
spans lie on one axis as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

Recorded = tuple[str, float, float]
"""Name, start and end (``time.perf_counter``) of a span of the process that recorded it."""

ROUTER = "router"
DEVICE = ", device"
"""The end of the name of a process's lane on an accelerator."""
TO_HOST, TO_DEVICE, KERNELS = "copy to host", "copy to device", "kernels"
LAYERS_SHOWN = 3
NESTING = {"step": 0, "layer": 1, "answer": 1}
"""Spans that others lie within; those that they are made of come on top of them."""
COLORS = {
    "dense": "#4e79a7",
    "send": "#f28e2b",
    "wait": "#d4cfc9",
    "combine": "#59a14f",
    "idle": "#eeeeee",
    "answer": "#edc948",
    "products": "#e15759",
    KERNELS: "#b07aa1",
    TO_HOST: "#76b7b2",
    TO_DEVICE: "#ff9da7",
}
MEANINGS = {
    "dense": "router: attention, norms, gate",
    "send": "build and send frames or answers",
    "wait": "router: wait for answers",
    "combine": "router: weigh and add",
    "idle": "actor: no frame",
    "answer": "actor: read frames, queue",
    "products": "actor: experts' products",
    KERNELS: "device: all computation",
    TO_HOST: "device",
    TO_DEVICE: "device",
}
_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 120, 20, 50
_LANE, _BAR, _LEGEND = 56, 36, 22
_TICKS_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Span(NamedTuple):
    """What a process did, and when; ``start_s`` and ``end_s`` are of ``time.perf_counter``."""

    process: str
    name: str
    start_s: float
    end_s: float


def write_trace(recorded: Mapping[str, Sequence[Recorded]], file: Path) -> None:
    """Write the trace of a round by lane to ``file``, and a picture of some layers beside it.

    Spans outside of the router's own are left out.
    """
    spans = [Span(process, *one) for process, some in recorded.items() for one in some]
    started_s = min(span.start_s for span in spans if span.process == ROUTER)
    ended_s = max(span.end_s for span in spans if span.process == ROUTER)
    spans = clip(spans, started_s, ended_s)
    file.write_text(json.dumps(chrome_trace(spans)) + "\n", encoding="utf-8")
    picture = svg(spans, *typical_window(spans))
    file.with_suffix(".svg").write_text(picture, encoding="utf-8")


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Return the object that chrome://tracing and ui.perfetto.dev open; times begin at 0."""
    processes = list(dict.fromkeys(span.process for span in spans))
    origin_s = min((span.start_s for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, process in enumerate(processes, start=1):
        thread = "engine" if process == ROUTER else "stream"
        thread = "device" if process.endswith(DEVICE) else thread
        for kind, name in (("process_name", process), ("thread_name", thread)):
            events.append({"ph": "M", "name": kind, "pid": pid, "tid": 1, "args": {"name": name}})
    for span in sorted(spans, key=lambda span: (span.start_s, -span.end_s)):
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": "router" if span.process == ROUTER else "actor",
                "pid": processes.index(span.process) + 1,
                "tid": 1,
                "ts": round((span.start_s - origin_s) * 1e6, 3),
                "dur": round((span.end_s - span.start_s) * 1e6, 3),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def clip(spans: Sequence[Span], start_s: float, end_s: float) -> list[Span]:
    """Return what of the spans lies between two times."""
    return [
        Span(s.process, s.name, max(s.start_s, start_s), min(s.end_s, end_s))
        for s in spans
        if s.start_s < end_s and s.end_s > start_s
    ]


def typical_window(spans: Sequence[Span], layers: int = LAYERS_SHOWN) -> tuple[float, float]:
    """Return when a few layers in the middle of the router's median step began and ended.

    The window begins with the dense part before the first of them. Raises ``ValueError`` when no
    step has a layer.
    """
    of_router = [span for span in spans if span.process == ROUTER]
    steps = sorted(
        (span for span in of_router if span.name == "step"), key=lambda s: s.end_s - s.start_s
    )
    if not steps:
        raise ValueError("the trace has no step")
    step = steps[len(steps) // 2]
    within = clip(of_router, step.start_s, step.end_s)
    found = sorted((span for span in within if span.name == "layer"), key=lambda s: s.start_s)
    if not found:
        raise ValueError("the trace's median step has no layer")
    first = max(0, (len(found) - layers) // 2)
    shown = found[first : first + layers]
    return (found[first - 1].end_s if first else step.start_s), shown[-1].end_s


def svg(spans: Sequence[Span], start_s: float, end_s: float) -> str:
    """Draw what lies between two times: a lane per process, bars, an axis in ms, a legend."""
    processes = sorted(
        {s.process for s in spans}, key=lambda name: (not name.startswith(ROUTER), name)
    )
    shown = clip(spans, start_s, end_s)
    bottom = _TOP + _LANE * len(processes)
    legend = [name for name in COLORS if any(span.name == name for span in shown)]
    height = bottom + 50 + _LEGEND * ((len(legend) + 2) // 3)
    scale = (_WIDTH - _LEFT - _RIGHT) / (end_s - start_s)

    def x(time_s: float) -> float:
        return _LEFT + (time_s - start_s) * scale

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">Layers of one decode step</text>',
    ]
    for lane, process in enumerate(processes):
        y = _TOP + lane * _LANE
        parts.append(_text(8, y + _BAR / 2 + 5, process))
        parts += [_bar(s, x(s.start_s), x(s.end_s), y) for s in _drawn(shown, process)]
    parts += _axis(x, start_s, end_s, bottom)
    layers = [s.start_s for s in shown if s.name == "layer" and s.process == ROUTER]
    for place, time_s in enumerate(layers, start=1):
        parts.append(_line(x(time_s), _TOP - 14, bottom, "#888888", "3 3"))
        parts.append(_text(x(time_s) + 3, _TOP - 5, f"dispatch {place}"))
    for place, name in enumerate(legend):
        left = _LEFT + (place % 3) * 340
        y = bottom + 44 + (place // 3) * _LEGEND
        parts.append(
            f'<rect x="{left}" y="{y - 11}" width="14" height="14" fill="{COLORS[name]}" '
            'stroke="#999999" stroke-width="0.5"/>'
        )
        parts.append(_text(left + 20, y + 1, f"{name} ({MEANINGS[name]})"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(spans: Sequence[Span], process: str) -> list[Span]:
    """Return a lane's bars, those first that others lie on."""
    of_process = [s for s in spans if s.process == process and s.name in COLORS]
    return sorted(of_process, key=lambda s: (-NESTING.get(s.name, -9), s.start_s))


def _bar(span: Span, left: float, right: float, y: float) -> str:
    title = f"{span.name} {(span.end_s - span.start_s) * 1e3:.3f} ms"
    return (
        f'<rect x="{left:.2f}" y="{y}" width="{max(right - left, 0.3):.2f}" height="{_BAR}" '
        f'fill="{COLORS[span.name]}"><title>{escape(title)}</title></rect>'
    )


def _axis(x: Any, start_s: float, end_s: float, y: float) -> list[str]:
    length_ms = (end_s - start_s) * 1e3
    tick_ms = next((tick for tick in _TICKS_MS if length_ms / tick <= 15), length_ms / 10)
    parts = [_line(_LEFT, y, y, "black", x2=_WIDTH - _RIGHT)]
    for count in range(int(length_ms / tick_ms + 1e-9) + 1):
        at = x(start_s + count * tick_ms / 1e3)
        parts.append(_line(at, y, y + 5, "black"))
        parts.append(_text(at, y + 19, f"{count * tick_ms:g}", "middle"))
    return [*parts, _text(_LEFT - 8, y + 19, "ms", "end")]


def _line(
    x1: float, y1: float, y2: float, color: str, dash: str = "none", x2: float | None = None
) -> str:
    return (
        f'<line x1="{x1:.2f}" y1="{y1}" x2="{x1 if x2 is None else x2:.2f}" y2="{y2}" '
        f'stroke="{color}" stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'
