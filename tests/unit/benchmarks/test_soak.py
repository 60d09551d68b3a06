"""The soak's pure parts: what counts as growth, what processes are called, when a run is good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.growth import Growth, Sample, growth, name_of, per_min
from benchmarks.soak import LEAD_S, is_good, longest_apart, met
from tests.fault.injector import Hit
from tests.fault.load import Wait
from tests.fault.schedule import Fault, Kind

PERIOD_S, COUNT = 5.0, 240


def judged(
    rss_mb: Callable[[float], float], descriptors: Callable[[float], float] = lambda minute: 50
) -> Growth:
    """Judge twenty minutes of a process that has so much at each minute."""
    times = [PERIOD_S * place for place in range(COUNT)]
    samples = [Sample(at, rss_mb(at / 60), int(descriptors(at / 60))) for at in times]
    return growth("router", 7, samples)


def test_a_trend_is_the_slope_and_a_burst_does_not_move_it() -> None:
    samples = [Sample(60.0 * x, 0.0, 0) for x in range(20)]
    line = [3.0 + 2.0 * x for x in range(20)]
    assert per_min(samples, line) == pytest.approx(2.0)
    line[7] = 1000.0
    assert per_min(samples, line) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["ray::ServeReplica:bench:Gateway.handle_request"], "Gateway"),
        (["ray::ServeReplica:bench:Router-bench"], "Router-bench"),
        (["ray::ExpertActor.compute"], "ExpertActor"),
        (["ray::IDLE"], "IDLE"),
        (["/x/raylet/raylet", "--port=1"], "raylet"),
        (["/usr/bin/python", "-u", "/x/monitor.py", "--y"], "monitor.py"),
        ([], "?"),
    ],
)
def test_processes_are_called_by_what_they_do(words: list[str], name: str) -> None:
    assert name_of(words) == name


def test_a_run_is_good_without_failures_and_without_growth() -> None:
    flat: dict[str, Any] = {
        "failures": {},
        "faults": {"kill actor": 3},
        "damages": {"damaged": 7},
        "processes": [{"is_flat": True}] * 2,
    }
    assert is_good(flat)
    assert is_good({**flat, "faults": {}, "damages": {}})
    assert not is_good({**flat, "damages": {}})  # it was to be among the faults
    assert not is_good({**flat, "failures": {"unavailable: x": 1}})
    assert not is_good({**flat, "processes": [{"is_flat": True}, {"is_flat": False}]})


def test_of_waits_at_the_same_time_the_longest_is_shown() -> None:
    waits = [
        Wait(began_s, took_s, 1, False)
        for began_s, took_s in [(0, 2), (1, 5), (5.9, 3), (6, 1), (20, 9)]
    ]
    assert longest_apart(waits, 9) == [waits[4], waits[1], waits[3]]
    assert longest_apart(waits, 1) == [waits[4]]
    assert longest_apart([], 1) == []


def test_a_wait_is_told_with_the_faults_before_and_in_it() -> None:
    at_s = [5.0, 10.1, 19.0, 22.9, 23.1]
    hits = [Hit(Fault(at, Kind.KILL_ACTOR, 0, 0.0), 7, at) for at in at_s]
    told = met(Wait(10.0 + LEAD_S, 3.0, 1, False), hits)
    assert [fault["pid"] for fault in told] == [7] * 3
    assert [fault["after_s"] for fault in told] == pytest.approx([-9.9, -1.0, 2.9])


def test_growth_is_a_twentieth_of_the_memory_after_the_first_quarter_or_ever_more_descriptors() -> (
    None
):
    flat = judged(lambda minute: 400.0, lambda minute: 50 + minute % 2 * 30)
    assert flat.is_flat
    assert (flat.mb_per_min, flat.first.at_s, flat.last.at_s) == (0.0, 0.0, PERIOD_S * (COUNT - 1))
    assert not judged(lambda minute: 400.0, lambda minute: 50 + 2 * minute).is_flat
    assert judged(lambda minute: 100.0 + 60.0 * min(minute, 5.0)).is_flat, "of the first quarter"
    for mb_per_min, is_flat in ((0.5, True), (1.5, True), (2.0, False)):
        told = judged(lambda minute, slope=mb_per_min: 480.0 + slope * minute)
        assert told.mb_per_min == pytest.approx(mb_per_min)
        assert told.is_flat is is_flat, mb_per_min
