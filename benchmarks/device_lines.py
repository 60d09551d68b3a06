"""The picture of ``benchmarks.scaling``: gains by number of devices, and device time lines.

Pure functions of the result. Every stream has a colour; a product of several rows has a stripe for
each, so that a device which works for others shows in their colours, and an idle one in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.drawing import curve, document, line, rect, text

TITLES = {
    "own": "each request its own expert",
    "one": "all requests one expert",
    "spread": "each token any expert",
}
LINE_COLORS = {"own": "#2a7f3f", "one": "#b02a2a", "spread": "#2a5fb0"}
_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 90, 20, 40
_CHART_WIDTH, _CHART, _LEGEND = 420, 260, 620
_LANE, _BAR = 22, 18
_IDLE, _GRID, _IDEAL = "#eeeeee", "#dddddd", "#999999"


def picture(result: Mapping[str, Any], seconds: float = 1.0) -> str:
    """Return an SVG: the gains, and below them ``seconds`` of the most devices, by traffic."""
    parts = _chart(result["gain"])
    y = _TOP + _CHART + 60
    for traffic, by_count in result["traffic"].items():
        lines = by_count[max(by_count, key=int)]["lines"]
        parts += _panel(TITLES[traffic], lines, seconds, result["streams"], y)
        y += 60 + _LANE * len(lines)
    return document(_WIDTH, y, parts)


def _chart(gains: Mapping[str, Mapping[str, float]]) -> list[str]:
    counts = sorted({int(count) for by_count in gains.values() for count in by_count})
    fewest, most = counts[0], counts[-1]

    def x(count: float) -> float:
        return _LEFT + _CHART_WIDTH * (count - fewest) / max(1, most - fewest)

    def y(gain: float) -> float:
        return _TOP + _CHART * (1 - gain * fewest / most)

    parts = [text(_LEFT, 22, f"Throughput, by that with {fewest}", size=15)]
    for count in counts:
        gain = count / fewest
        parts.append(line(x(fewest), y(gain), x(most), y(gain), _GRID))
        parts.append(text(_LEFT - 8, y(gain) + 4, f"{gain:g}", "end"))
        parts.append(text(x(count), _TOP + _CHART + 18, str(count), "middle"))
    parts.append(text(x(most) + 20, _TOP + _CHART + 18, "devices"))
    parts.append(line(x(fewest), y(1), x(most), y(most / fewest), _IDEAL, "4 4"))
    parts.append(line(_LEGEND, _TOP - 1, _LEGEND + 30, _TOP - 1, _IDEAL, "4 4"))
    parts.append(text(_LEGEND + 40, _TOP + 3, "as many times as there are devices"))
    for place, (traffic, by_count) in enumerate(gains.items()):
        points = [(x(int(count)), y(gain)) for count, gain in by_count.items()]
        parts += curve(points, LINE_COLORS[traffic])
        at = _TOP + 30 + 26 * place
        parts.append(line(_LEGEND, at - 4, _LEGEND + 30, at - 4, LINE_COLORS[traffic]))
        words = f"{TITLES[traffic]}: {by_count[str(most)]:.2f} with {most}"
        parts.append(text(_LEGEND + 40, at, words))
    return parts


def _panel(
    title: str,
    lines: Mapping[str, Sequence[Sequence[Any]]],
    seconds: float,
    streams: int,
    top: float,
) -> list[str]:
    scale = (_WIDTH - _LEFT - _RIGHT) / seconds
    parts = [text(_LEFT, top, f"{seconds:g} s of the devices: {title}", size=15)]
    for lane, (device, products) in enumerate(lines.items()):
        y = top + 12 + lane * _LANE
        parts.append(text(_LEFT - 8, y + _BAR - 5, device, "end"))
        parts.append(rect(_LEFT, y, seconds * scale, _BAR, _IDLE))
        for start_s, end_s, owners in products:
            left, right = max(start_s, 0.0) * scale, min(end_s, seconds) * scale
            height = _BAR / len(owners)
            for place, stream in enumerate(sorted(owners)):
                told = f"stream {stream}, {(end_s - start_s) * 1e3:.1f} ms"
                where = (_LEFT + left, y + place * height, right - left, height)
                parts.append(rect(*where, _color(stream, streams), told))
    return parts


def _color(stream: int, streams: int) -> str:
    """Return a hue for each stream; neighbours are apart, and light and dark take turns."""
    hue = (stream * 360 * 5 / streams) % 360
    return f"hsl({hue:.0f},65%,{45 if stream % 2 else 62}%)"
