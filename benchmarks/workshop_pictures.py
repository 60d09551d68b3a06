"""The pictures of the workshop's experiments, each a pure function of their result.

Marks are means over the seeds, whiskers reach from the lowest to the highest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.drawing import curve, document, line, rect, text
from benchmarks.workshop_tables import (
    FIRST_SHARED,
    WAYS,
    Result,
    counts_of,
    layers_of,
    models_of,
    perplexities,
    pruned_perplexities,
    seeds_of,
)

_WIDTH, _LEFT, _TOP, _CHART = 760, 70, 60, 300
_GRID = "#dddddd"
_COLORS = ("#2a5fb0", "#2a7f3f", "#b02a2a", "#b06a2a", "#7a3fa0", "#3f8f9f", "#777777")
_FACTORS = (1, 2, 3, 5)
Height = Callable[[float], float]
"""Returns the y of a value."""


def pictures(result: Result) -> dict[str, str]:
    """Return all pictures as SVG, by file name."""
    return {
        "one_expert.svg": one_expert(result),
        "counts.svg": counts(result),
        "information.svg": information(result),
        **{
            f"experts-seed-{seed}.svg": experts(seed, one["experts"])
            for seed, one in result["seeds"].items()
        },
    }


def one_expert(result: Result) -> str:
    """Return each model's perplexity before and after continued training, each on its own scale."""
    names = models_of(result)
    middle = _WIDTH / 2
    halves = {"before": (_LEFT, middle - 10), "after": (middle + _LEFT - 10, _WIDTH - 20.0)}
    parts = [text(10, 24, "Held-out perplexity", size=15)]
    for when, (left, right) in halves.items():
        found = [perplexities(result, when, name) for name in names]
        axis, y = _log_axis([value for some in found for value in some], left, right)
        parts += axis
        gap = (right - left) / len(names)
        for number, (values, color) in enumerate(zip(found, _COLORS, strict=False)):
            parts += _series([left + gap * (number + 0.5)], [values], color, y)
        words = f"{when} continued training"
        parts.append(text((left + right) / 2, _TOP + _CHART + 22, words, "middle"))
    return document(_WIDTH, _TOP + _CHART + 40, [*parts, *_legend(names)])


def counts(result: Result) -> str:
    """Return the perplexity by the number of experts that pruning leaves."""
    numbers = counts_of(result)
    found = {by: [pruned_perplexities(result, by, count) for count in numbers] for by in WAYS}
    whole = perplexities(result, "before", "whole")
    every = [value for some in found.values() for values in some for value in values]
    parts, y = _log_axis([*every, *whole], _LEFT, _WIDTH - 20)
    parts.append(text(10, 24, "Held-out perplexity of the pruned model", size=15))
    gap = (_WIDTH - _LEFT - 80) / (len(numbers) - 1)
    places = [_LEFT + 40 + gap * index for index in range(len(numbers))]
    for x, count in zip(places, numbers, strict=True):
        parts.append(text(x, _TOP + _CHART + 22, count, "middle"))
    parts.append(text(_WIDTH / 2, _TOP + _CHART + 42, "experts a layer", "middle"))
    level = y(statistics.fmean(whole))
    parts.append(line(_LEFT, level, _WIDTH - 20, level, _COLORS[-1], "5 4"))
    of_all = seeds_of(result)[0]["experts"]["num_experts"]
    parts.append(text(_LEFT + 4, level - 6, f"all {of_all}"))
    for number, (by, color) in enumerate(zip(WAYS, _COLORS, strict=False)):
        parts += _series([x + 7 * (number - 1) for x in places], found[by], color, y)
    return document(
        _WIDTH, _TOP + _CHART + 60, [*parts, *_legend(["by output", "by weight", "at random"])]
    )


def information(result: Result) -> str:
    """Return what each label tells of a token's experts, by layer."""
    layers = layers_of(result)
    labels = list(layers[0][0]["told"])
    found = [
        [[100 * one["told"][label]["share"] for one in layer] for label in labels]
        for layer in layers
    ]
    most = max(value for layer in found for values in layer for value in values)
    parts, y = _linear_axis(most)
    title = "% of the experts' entropy that a label tells beyond chance"
    parts.append(text(10, 24, title, size=15))
    group = (_WIDTH - _LEFT - 20) / len(layers)
    wide = (group - 20) / len(labels)
    for index, layer in enumerate(found):
        left = _LEFT + 10 + group * index
        parts.append(text(left + (group - 20) / 2, _TOP + _CHART + 22, f"layer {index}", "middle"))
        for number, (label, values) in enumerate(zip(labels, layer, strict=True)):
            mean, x = max(statistics.fmean(values), 0.0), left + wide * number
            title = f"layer {index}, {label}: {mean:.1f} %"
            parts.append(rect(x, y(mean), wide, y(0) - y(mean), _COLORS[number], title))
            parts += _whisker(x + wide / 2, values, "#333333", y)
    bottom = _TOP + _CHART + 36
    for number, label in enumerate(labels):
        column, row = number % 3, number // 3
        x, at = _LEFT + 230 * column, bottom + 20 * row
        parts += [rect(x, at, 14, 14, _COLORS[number]), text(x + 20, at + 12, label)]
    note = f"{FIRST_SHARED} and after it: of the tokens that all languages have"
    parts.append(text(_WIDTH - 20, bottom + 52, note, "end"))
    return document(_WIDTH, bottom + 70, parts)


def experts(seed: str, found: Mapping[str, Any]) -> str:
    """Return heat maps of a seed: each expert's share of a kind's or a language's assignments."""
    layers, count, cell, left, top = found["layers"], found["num_experts"], 22, 130, 64
    rows = [*((name, "kinds") for name in layers[0]["kinds"])]
    rows += [(name, "languages") for name in layers[0]["languages"]]
    num_kinds, gap, wide = len(layers[0]["kinds"]), 10, count * cell + 16
    highest = max(max(layer[part][name]) for layer in layers for name, part in rows)
    title = f"Each expert's share of a row's assignments, seed {seed}; even is {100 / count:.1f} %"
    parts = [text(10, 24, title, size=15)]
    for row, (name, _) in enumerate(rows):
        y = top + row * cell + (gap if row >= num_kinds else 0)
        parts.append(text(left - 8, y + 15, name, "end"))
    for index, layer in enumerate(layers):
        x0 = left + index * wide
        parts.append(text(x0 + count * cell / 2, top - 10, f"layer {layer['layer']}", "middle"))
        for row, (name, part) in enumerate(rows):
            y = top + row * cell + (gap if row >= num_kinds else 0)
            for expert_id, share in enumerate(layer[part][name]):
                told = f"layer {layer['layer']}, {name}, expert {expert_id}: {100 * share:.1f} %"
                x = x0 + expert_id * cell
                parts.append(rect(x, y, cell, cell, _shade(share / highest), told))
    bottom = top + len(rows) * cell + gap + 16
    parts += _scale(left, bottom, highest)
    return document(left + len(layers) * wide + 10, bottom + 40, parts)


def _shade(part: float) -> str:
    """Return a color from white at 0 to dark blue at 1."""
    return "#" + "".join(f"{round(255 + (end - 255) * part):02x}" for end in (0x10, 0x2A, 0x70))


def _scale(x: float, y: float, highest: float) -> list[str]:
    steps = 20
    parts = [rect(x + 10 * n, y, 10, 14, _shade(n / (steps - 1))) for n in range(steps)]
    parts.append(text(x - 8, y + 12, "0 %", "end"))
    return [*parts, text(x + 10 * steps + 8, y + 12, f"{100 * highest:.0f} %")]


def _series(
    places: Sequence[float], values: Sequence[Sequence[float]], color: str, y: Height
) -> list[str]:
    """Return a curve of means, with whiskers."""
    points = [(x, y(statistics.fmean(v))) for x, v in zip(places, values, strict=True)]
    whiskers = [
        part for x, v in zip(places, values, strict=True) for part in _whisker(x, v, color, y)
    ]
    return [*curve(points, color), *whiskers]


def _whisker(x: float, values: Sequence[float], color: str, y: Height) -> list[str]:
    low, high = y(min(values)), y(max(values))
    ends = [line(x - 4, at, x + 4, at, color) for at in (low, high)]
    return [line(x, low, x, high, color), *ends]


def _log_axis(values: Sequence[float], left: float, right: float) -> tuple[list[str], Height]:
    """Return the lines of a chart, and the place of a value, on a scale of equal factors."""
    low, high = math.log(min(values)) - 0.05, math.log(max(values)) + 0.05

    def y(value: float) -> float:
        return _TOP + _CHART * (high - math.log(value)) / (high - low)

    return _lines(_ticks(math.exp(low), math.exp(high)), y, left, right), y


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two: equal steps, or where they are far apart like factors."""
    if high / low < 4:
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        steps = range(math.ceil(low / step), math.floor(high / step) + 1)
        return [number * step for number in steps][:: 1 + len(steps) // 8]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick * 10.0**decade for decade in decades for tick in _FACTORS]
    return [tick for tick in ticks if low <= tick <= high]


def _linear_axis(most: float) -> tuple[list[str], Height]:
    """Return the lines of a chart from 0 on, and the place of a value."""
    step = next(one for one in (1, 2, 5, 10, 20) if most / one <= 7)
    high = step * math.ceil(most / step)

    def y(value: float) -> float:
        return _TOP + _CHART * (1 - value / high)

    return _lines(range(0, high + 1, step), y, _LEFT, _WIDTH - 20), y


def _lines(ticks: Sequence[float], y: Height, left: float, right: float) -> list[str]:
    parts = []
    for tick in ticks:
        parts.append(line(left, y(tick), right, y(tick), _GRID))
        parts.append(text(left - 8, y(tick) + 4, f"{tick:g}", "end"))
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for name, color in zip(names, _COLORS, strict=False):
        parts += [line(x, 44, x + 20, 44, color), text(x + 26, 48, name)]
        x += 50 + 7 * len(name)
    return parts
