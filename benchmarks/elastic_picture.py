"""The picture of ``benchmarks.elastic``: load, actors and copies, and times between tokens.

A pure function of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.drawing import document, line, polyline, text

_WIDTH, _LEFT, _RIGHT, _CHART, _GAP = 1000, 80, 20, 150, 70
_GRID, _MARK = "#dddddd", "#999999"
_LINES: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "Tokens a second": [("tokens_per_s", "#2a5fb0", "what clients got")],
    "Actors and copies": [
        ("actors", "#2a7f3f", "actors that hold experts"),
        ("copies", "#b06a2a", "copies of all experts, by the actors' scale times ten"),
    ],
    "Time between tokens, ms": [
        ("p50_ms", "#2a7f3f", "p50 of each second"),
        ("p99_ms", "#b02a2a", "p99"),
    ],
}
_PER_ACTOR = 10
"""Copies are drawn by the actors' scale, each tenth one."""


def picture(step: Mapping[str, Any]) -> str:
    """Return an SVG: three charts over the seconds, with marks where the crowd comes and leaves."""
    course = step["course"]
    seconds = course[-1]["at_s"]
    scale = (_WIDTH - _LEFT - _RIGHT) / seconds
    parts, top = [], 50.0
    for title, names in _LINES.items():
        parts += _chart(title, names, course, lambda at_s: _LEFT + at_s * scale, top)
        for at_s in (step["come_s"], step["leave_s"]):
            x = _LEFT + at_s * scale
            parts.append(line(x, top, x, top + _CHART, _MARK, "4 4"))
        top += _CHART + _GAP
    bottom = top - _GAP + 20
    for at_s in range(0, int(seconds) + 1, 10):
        parts.append(text(_LEFT + at_s * scale, bottom, f"{at_s} s", "middle"))
    return document(_WIDTH, bottom + 20, parts)


def _chart(
    title: str,
    names: Sequence[tuple[str, str, str]],
    course: Sequence[Mapping[str, Any]],
    x: Callable[[float], float],
    top: float,
) -> list[str]:
    values = {name: [_shown(name, one[name]) for one in course] for name, _, _ in names}
    largest = max((v for some in values.values() for v in some if v is not None), default=1) or 1
    parts = [text(_LEFT, top - 26, title, size=15)]
    for part in (0.0, 0.5, 1.0):
        y = top + _CHART * (1 - part)
        parts.append(line(_LEFT, y, _WIDTH - _RIGHT, y, _GRID))
        parts.append(text(_LEFT - 8, y + 4, f"{largest * part:,.3g}", "end"))
    at = _LEFT + 250
    for name, color, words in names:
        points = [
            (x(one["at_s"]), top + _CHART * (1 - value / largest))
            for one, value in zip(course, values[name], strict=True)
            if value is not None
        ]
        parts.append(polyline(points, color))
        parts += [line(at, top - 30, at + 24, top - 30, color), text(at + 30, top - 26, words)]
        at += 240
    return parts


def _shown(name: str, value: float | None) -> float | None:
    return value / _PER_ACTOR if name == "copies" and value is not None else value
