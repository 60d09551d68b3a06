"""The verdicts of the benchmark of edges: what is kept, what is missed, and what is said."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from benchmarks import edges
from benchmarks.common import Verdict
from benchmarks.held import METRICS, RAYS, above, total


def process(name: str, is_flat: bool = True) -> dict[str, Any]:
    grown = {"mb_per_min": 0.0 if is_flat else 40.0, "descriptors_per_min": 3.0}
    return {"name": name, "pid": 1, "is_memory_flat": is_flat, **grown}


def summary(p99_ms: float) -> dict[str, dict[str, float]]:
    one = {"p50_ms": 1.0, "p99_ms": p99_ms, "count": 9}
    return {"first_token": dict(one), "between_tokens": dict(one)}


BEFORE = dict.fromkeys([*METRICS, *RAYS], 0.0) | {"Ray tasks": 3.0}
GOOD: dict[str, Any] = {
    "overload": {
        "kinds": {"gRPC": {"OK": 5, "RESOURCE_EXHAUSTED": 15}, "HTTP": {"200": 5, "429": 15}},
        "recovered_s": 4.9,
        "processes": [process("Gateway"), process("clients", is_flat=False)],
        "descriptors": {"before": {"Gateway": 90.0}, "after": {"Gateway": 95.0}},
    },
    "cancels": {
        "left": {"gRPC stream": 250, "HTTP whole": 250},
        "before": BEFORE,
        "after": {**BEFORE, "Ray tasks": 2.0},
        "back_s": {**dict.fromkeys(BEFORE, 0.0), "running": 0.9, "Ray objects": 7.0},
        "descriptors": {"before": {"Gateway": 90.0}, "after": {"Gateway": 95.0}},
        "memory_mb": {"before": {"Gateway": 400.0}, "after": {"Gateway": 419.0}},
    },
    "stalls": {
        "readers": 100,
        "with": summary(109.0),
        "without": summary(100.0),
        "stretches": {"without": [summary(98.0), summary(103.0)], "with": [summary(109.0)]},
    },
    "validation": {"16 token ids": 17.0, "a text": 49.9},
}


def missed(part: str, change: dict[str, Any]) -> list[Verdict]:
    changed = deepcopy(GOOD)
    changed[part] |= change
    return [one for one in edges.judge(changed) if not one.is_kept]


def test_a_good_run_keeps_every_figure() -> None:
    verdicts = edges.judge(GOOD)
    assert all(one.is_kept for one in verdicts)
    assert len(verdicts) == 4 + 5 + 2 + 2
    assert [one.measured for one in verdicts][:3] == ["no other", "after 4.9 s", "flat, all 1"]


@pytest.mark.parametrize("part", edges.PARTS)
def test_parts_that_were_not_run_are_not_judged(part: str) -> None:
    figures = {one.figure for one in edges.judge({part: GOOD[part]})}
    assert figures == {one.figure for one in edges.JUDGES[part](GOOD[part])}
    assert edges.judge({}) == []


@pytest.mark.parametrize(
    ("part", "change", "figure", "said"),
    [
        ("overload", {"kinds": {"gRPC": {"UNAVAILABLE": 2}}}, "statuses", "2 gRPC UNAVAILABLE"),
        ("overload", {"kinds": {"HTTP": {"503": 1}}}, "statuses", "1 HTTP 503"),
        (
            "overload",
            {"kinds": {"HTTP": {"429 without a time": 3}}},
            "statuses",
            "3 HTTP 429 without a time",
        ),
        ("overload", {"recovered_s": 5.1}, "normal latency again", "after 5.1 s"),
        ("overload", {"recovered_s": None}, "normal latency again", "never"),
        (
            "overload",
            {"processes": [process("Gateway"), process("Router", is_flat=False)]},
            "memory of the serving processes",
            "Router +40.0 MB a minute",
        ),
        (
            "overload",
            {"processes": []},
            "memory of the serving processes",
            "flat, all 0",
        ),
        (
            "overload",
            {"descriptors": {"before": {"Gateway": 90.0}, "after": {"Gateway": 106.0}}},
            "descriptors",
            "16 Gateway",
        ),
        (
            "cancels",
            {"left": {"gRPC stream: StopIteration": 2}},
            "clients left as they meant to",
            "2 gRPC stream: StopIteration",
        ),
        (
            "cancels",
            {"after": {**BEFORE, "running": 1.0}},
            "slots and places",
            "running 1",
        ),
        (
            "cancels",
            {"after": {**BEFORE, "Ray tasks": 4.0, "Ray objects": 9.0}},
            "Ray's tasks and objects",
            "Ray tasks 4, Ray objects 9",
        ),
        (
            "cancels",
            {"descriptors": {"before": {"Gateway": 90.0}, "after": {"Gateway": 106.0}}},
            "descriptors",
            "16 Gateway",
        ),
        (
            "cancels",
            {"memory_mb": {"before": {"Gateway": 400.0}, "after": {"Gateway": 420.0}}},
            "memory, MB",
            "20 Gateway",
        ),
        (
            "validation",
            {"a text": 50.1},
            "checking a text",
            "50.1 µs",
        ),
        ("validation", {"960 token ids": 50.1}, "checking 960 token ids", "50.1 µs"),
    ],
)
def test_what_is_missed_is_told(part: str, change: dict[str, Any], figure: str, said: str) -> None:
    [verdict] = missed(part, change)
    assert verdict.figure == figure
    assert verdict.measured == said


def test_others_may_wait_a_tenth_longer_beside_stalled_readers() -> None:
    [first, between] = missed("stalls", {"with": summary(110.5)})
    assert first.figure == "others' p99, first token"
    assert between.measured == ("110.5 beside 100.0 ms, +10.5% (stretches without: 98.0 to 103.0)")


def test_a_process_that_is_new_has_grown_from_nothing() -> None:
    assert edges.grown({}, {"Gateway": 30.0}, lambda before: 16.0) == {"Gateway": 30.0}
    assert edges.grown({"Gateway": 30.0}, {}, lambda before: 16.0) == {}


def test_samples_of_a_metric_are_summed_over_its_labels() -> None:
    lines = ["# HELP a_b x", 'a_b{m="1"} 2.0', 'a_b{m="2"} 0.5', "a_bc 9.0", "a_b 1e1"]
    assert total(lines, "a_b") == 12.5
    assert total([], "a_b") == 0.0


def test_only_more_than_before_is_above() -> None:
    assert above({"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 1.0, "b": 1.5, "c": 1.0}) == ["b"]
