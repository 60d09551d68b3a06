"""Open-loop load: arrivals, asking on time, what counts as which answer, the knee."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import knee
from benchmarks.open_loop import Answer, arrivals_s, kinds, late_ms, offer
from benchmarks.overload import NORMAL_FACTOR, probes_s, recovered_s


def answer(
    due_s: float, took_s: float, kind: str = "OK", pieces: list[tuple[float, int]] | None = None
) -> Answer:
    return Answer("gRPC", due_s, due_s, due_s + took_s, kind, pieces or [])


def test_arrivals_come_at_the_rate_and_know_nothing_of_each_other() -> None:
    times = arrivals_s(50.0, 200.0, seed=3)
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 200.0
    assert len(times) == pytest.approx(10_000, rel=0.04)  # four standard deviations
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)
    assert times == arrivals_s(50.0, 200.0, seed=3)
    assert times != arrivals_s(50.0, 200.0, seed=4)


def test_requests_are_sent_when_due_though_none_is_answered() -> None:
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        all_sent = asyncio.Event()

        async def ask(number: int, start_s: float) -> float:
            sent_s = loop.time() - start_s
            if number == 2:
                all_sent.set()
            await all_sent.wait()
            return sent_s

        return await offer([0.0, 0.02, 0.02], ask)

    sent_s = asyncio.run(asyncio.wait_for(run(), 20))
    assert sent_s[0] >= 0.0
    assert all(one >= 0.02 for one in sent_s[1:])


def test_no_requests_are_no_answers() -> None:
    async def ask(number: int, start_s: float) -> int:
        raise AssertionError("nothing is due")

    assert asyncio.run(offer([], ask)) == []


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = Answer("HTTP", 1.0, 1.5, 3.0, "200", [(2.0, 1), (2.6, 3)])
    assert late.is_answered
    assert late.took_s == 2.0
    assert late.first_token_s == 1.0
    assert late.between_s() == pytest.approx([0.2] * 3)
    assert late_ms([late])["p50_ms"] == 500.0


def test_answers_are_counted_by_surface_and_kind() -> None:
    some = [answer(0, 1), answer(0, 1), answer(0, 1, "RESOURCE_EXHAUSTED")]
    told = kinds([*some, Answer("HTTP", 0, 0, 1, "429")])
    assert told == {"gRPC": {"OK": 2, "RESOURCE_EXHAUSTED": 1}, "HTTP": {"429": 1}}


def test_probes_come_evenly() -> None:
    assert probes_s(60.0, 1.0) == [60.0, 60.25, 60.5, 60.75]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([(0.0, 0.2), (1.0, 0.3)], 0.0),
        ([(0.0, 9.0), (1.0, 0.4), (2.0, 0.1)], 1.0),
        ([(0.0, 0.1), (1.0, 0.6), (2.0, 0.1)], 2.0),  # a normal one in between is luck
        ([(0.0, 0.1), (1.0, float("inf"))], None),
        ([], None),
    ],
)
def test_latency_has_recovered_when_it_stays_normal(
    after: list[tuple[float, float]], expected: float | None
) -> None:
    assert NORMAL_FACTOR * 0.4 < 0.6
    assert recovered_s([0.2, 0.4], after) == expected


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(7.0, 3.0)], 0),
        ([(1.0, 1.0), (2.0, 1.1), (4.0, 1.5), (5.0, 4.0)], 2),  # powers 1, 1.8, 2.7, 1.25
        ([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], 0),  # equals: the first
        ([(2.0, 1.0), (3.0, 1.0), (3.0, 9.0)], 1),
    ],
)
def test_the_knee_has_the_most_power(points: list[tuple[float, float]], expected: int) -> None:
    assert knee.knee(points) == expected


def test_the_knee_of_a_queue_with_one_server_is_half_its_load() -> None:
    loads = [place / 20 for place in range(1, 20)]
    assert loads[knee.knee([(load, 1 / (1 - load)) for load in loads])] == 0.5


def test_a_rate_is_summarized_without_its_first_part() -> None:
    pieces = [(4.0, 1), (4.5, 1)]
    told = knee.summarize(
        [
            answer(0.5, 1.0, pieces=[(1.0, 1)]),  # came and ended too early
            answer(1.5, 3.0, pieces=pieces),  # came too early, ended in time
            answer(3.0, 2.0, pieces=pieces),
            answer(9.0, 4.0, pieces=[(10.0, 1)]),  # ended too late
            answer(9.5, 0.1, "RESOURCE_EXHAUSTED"),
            answer(9.6, 0.1, "UNAVAILABLE"),
        ],
        10.0,
    )
    assert told["offered_per_s"] == 4 / 8
    assert told["answered_per_s"] == 2 / 8
    assert (told["refused"], told["failed"]) == (1, 1)
    assert told["mean_s"] == 3.0
    assert told["request"]["count"] == 2
    assert told["between_tokens"]["count"] == 1


def test_a_rate_without_answers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="none of 1 requests"):
        knee.summarize([answer(9.0, 0.1, "UNAVAILABLE")], 10.0)


def result_of() -> dict[str, Any]:
    points = [
        {
            "rate": rate,
            **knee.summarize([answer(2.0, took_s, pieces=[(2.1, 1), (2.2, 1)])], 10.0),
        }
        for rate, took_s in ((1.0, 0.5), (2.0, 0.7))
    ]
    return {"tokens": 32, "closed_loop_per_s": 3.0, "points": points, "knee": 1}


def test_the_picture_tells_where_the_knee_is(tmp_path: Path) -> None:
    knee.plot(result_of(), tmp_path / "knee.svg")
    assert ElementTree.parse(tmp_path / "knee.svg").getroot().tag.endswith("svg")


def test_runs_are_compared_by_what_was_answered() -> None:
    figures = knee.comparable(result_of())
    assert figures["most answered, requests/s"].value == 1 / 8
    assert figures["lowest load, request p50 ms"].value == 500.0
