"""Rates of experts and devices from counters, by a clock that the test turns."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.load import FALL_S, MIN_FALL_S, RISE_S, WINDOW_S, DeviceLoad, LoadTracker
from cluster.spec import ActorReport, ExpertKey

A, B = ExpertKey("m", 0, 0), ExpertKey("m", 0, 1)


def report(
    tokens: dict[ExpertKey, int],
    actor_id: str = "one",
    generation: int = 1,
    frames: int = 0,
    busy_s: float = 0.0,
    waited_s: float = 0.0,
) -> ActorReport:
    return ActorReport(
        actor_id, generation, "", 1, 1, "node", "cpu", (A, B), 20, tokens, 0, 0, frames, busy_s,
        waited_s,
    )  # fmt: skip


@given(st.lists(st.floats(0.01, 40.0), min_size=1, max_size=40))
def test_a_steady_load_is_told_exactly_however_reports_come(gaps_s: list[float]) -> None:
    tracker, now_s = LoadTracker(5.0), 5.0
    tracker.observe(report({}), now_s)
    for gap_s in gaps_s:
        now_s += gap_s
        passed_s = now_s - 5.0
        # 100 and 7 a second, of which frames are 2 that wait 3 ms; a fifth of the time is busy.
        tracker.observe(
            report(
                {A: 100 * passed_s, B: 7 * passed_s},  # type: ignore[dict-item]
                frames=2 * passed_s,  # type: ignore[arg-type]
                busy_s=0.2 * passed_s,
                waited_s=0.006 * passed_s,
            ),
            now_s,
        )
    assert tracker.tokens_per_s(now_s) == pytest.approx({A: 100, B: 7})
    load = tracker.devices(now_s)["one"]
    assert (load.tokens_per_s, load.busy, load.wait_s) == pytest.approx((107, 0.2, 0.003))
    assert isinstance(load, DeviceLoad)


def test_nothing_is_known_before_a_second_report() -> None:
    tracker = LoadTracker(0.0)
    assert (tracker.tokens_per_s(0.0), tracker.devices(0.0)) == ({}, {})
    tracker.observe(report({A: 1_000_000}), 1.0)
    assert (tracker.tokens_per_s(1.0), tracker.devices(1.0)) == ({}, {})
    tracker.observe(report({A: 1_000_000}), 1.0)  # no time has passed
    assert tracker.devices(1.0) == {}


def test_an_experts_rate_is_that_of_all_its_copies() -> None:
    tracker = LoadTracker(0.0)
    for actor_id in ("one", "two"):
        tracker.observe(report({A: 10}, actor_id), 0.0)
    tracker.observe(report({A: 40}, "one"), 2.0)
    tracker.observe(report({A: 20}, "two"), 2.0)
    assert tracker.tokens_per_s(2.0) == pytest.approx({A: 20})
    told = {a: load.tokens_per_s for a, load in tracker.devices(2.0).items()}
    assert told == pytest.approx({"one": 15, "two": 5})


def test_a_new_generation_counts_from_where_it_begins() -> None:
    tracker = LoadTracker(0.0)
    tracker.observe(report({}), 0.0)
    tracker.observe(report({A: 100}), 1.0)
    tracker.observe(report({A: 3}, generation=2), 2.0)
    tracker.observe(report({A: 103}, generation=2), 3.0)
    assert tracker.devices(3.0)["one"].tokens_per_s == pytest.approx(100)
    assert tracker.tokens_per_s(3.0)[A] == pytest.approx(200 / 3, rel=0.05)
    tracker.forget("one")
    tracker.forget("never seen")
    assert tracker.devices(3.0) == {}
    assert tracker.tokens_per_s(3.0)[A] > 0


def test_devices_of_a_kind_are_equally_fast_and_idle_kinds_unknown() -> None:
    tracker = LoadTracker(0.0)
    kinds = {"g1": "gpu", "g2": "gpu", "c1": "cpu", "i1": "idle"}
    for actor_id in kinds:
        tracker.observe(report({}, actor_id), 0.0)
    tracker.observe(report({A: 900}, "g1", busy_s=2.0), 4.0)
    tracker.observe(report({A: 100}, "g2", busy_s=2.0), 4.0)
    tracker.observe(report({B: 40}, "c1", busy_s=4.0), 4.0)
    tracker.observe(report({B: 1}, "i1", busy_s=0.1), 4.0)
    assert tracker.speeds(kinds, 4.0) == pytest.approx({"g1": 250, "g2": 250, "c1": 10})


def test_a_rise_shows_within_a_second_and_a_fall_fades() -> None:
    tracker, counted = LoadTracker(0.0), 0
    tracker.observe(report({}), 0.0)
    for quarter in range(1, 401):
        counted += 250 if quarter <= 400 - 4 else 1000  # a thousand a second, then four for one
        tracker.observe(report({A: counted}), quarter / 4)
        if quarter == 396:
            assert tracker.tokens_per_s(99.0)[A] == pytest.approx(1000)
    after = tracker.tokens_per_s(100.0)[A]
    steady = 1000 + 3000 * (1 - math.exp(-1 / WINDOW_S))
    surely = 1000 + 3000 * (1 - math.exp(-1 / RISE_S))
    assert 2 * steady * 0.9 < after < surely
    for quarter in range(401, 421):
        tracker.observe(report({A: counted}), quarter / 4)
    assert tracker.tokens_per_s(105.0)[A] == pytest.approx(
        steady * math.exp(-5 / WINDOW_S), rel=0.01
    )


def test_what_may_be_chance_is_no_rise() -> None:
    tracker = LoadTracker(0.0)
    tracker.observe(report({}), 0.0)
    for second in range(1, 101):
        tracker.observe(report({A: second}), float(second))
    tracker.observe(report({A: 100 + 4}), 101.0)  # four instead of one, once
    assert tracker.tokens_per_s(101.0)[A] == pytest.approx(1.1, rel=0.02)


def asked(tracker: LoadTracker, a_tokens_s: float, b_tokens_s: float, to_s: int) -> float:
    """Ask for so many tokens a second from where the tracker is; returns when A's rate was 0."""
    last = tracker._devices["one"]
    counted, begun_s = dict(last.last.tokens), last.at_s
    for quarter in range(1, int((to_s - begun_s) * 4) + 1):
        now_s = begun_s + quarter / 4
        tokens = {
            A: counted.get(A, 0) + int(a_tokens_s * quarter / 4),
            B: counted.get(B, 0) + int(b_tokens_s * quarter / 4),
        }
        tracker.observe(report(tokens), now_s)
        if tracker.tokens_per_s(now_s).get(A) == 0:
            return now_s
    return math.inf


@pytest.mark.parametrize(("set_s", "fall_s"), [(None, FALL_S), (10.0, 10.0), (0.2, MIN_FALL_S)])
@pytest.mark.parametrize("ended_s", [240, 241, 243])
def test_a_load_that_ended_is_forgotten_within_the_time_that_is_set(
    set_s: float | None, fall_s: float, ended_s: int
) -> None:
    tracker = LoadTracker(0.0) if set_s is None else LoadTracker(0.0, set_s)
    tracker.observe(report({}), 0.0)
    assert asked(tracker, 50.0, 20.0, ended_s) == math.inf
    assert tracker.tokens_per_s(ended_s) == pytest.approx({A: 50, B: 20}, rel=0.01)
    gone_s = asked(tracker, 0.0, 20.0, ended_s + 200) - ended_s
    # Eight tenths of the time have to be without any; where the last tenth began is chance.
    assert 0.8 * fall_s <= gone_s <= 0.9 * fall_s + 0.5
    assert tracker.tokens_per_s(ended_s + gone_s)[B] == pytest.approx(20, rel=0.05)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(5, 200))
def test_a_load_that_comes_by_chance_is_forgotten_within_the_time_too(
    seed: int, tokens_per_s: int
) -> None:
    source = random.Random(seed)
    times = [source.uniform(0, 100) for _ in range(100 * tokens_per_s)]
    ended_s = max(times)
    tracker, rate = LoadTracker(0.0, 10.0), math.inf
    counted = 0
    times.sort(reverse=True)
    for quarter in range(501):
        while times and times[-1] <= quarter / 4:
            times.pop()
            counted += 1
        tracker.observe(report({A: counted, B: 20 * quarter}), quarter / 4)
        rate = tracker.tokens_per_s(quarter / 4).get(A, math.inf)
        assert rate > 0 or quarter / 4 > ended_s + 8
        if quarter / 4 > ended_s + 9.5:
            assert rate == 0


def test_a_load_that_falls_by_half_has_that_rate_within_the_time() -> None:
    tracker = LoadTracker(0.0, 10.0)
    tracker.observe(report({}), 0.0)
    asked(tracker, 40.0, 20.0, 200)
    asked(tracker, 20.0, 20.0, 210)
    assert tracker.tokens_per_s(210.0)[A] == pytest.approx(20, rel=0.15)
    asked(tracker, 20.0, 20.0, 300)
    assert tracker.tokens_per_s(300.0) == pytest.approx({A: 20, B: 20}, rel=0.05)


def test_what_is_asked_for_rarely_is_not_forgotten_in_a_pause_that_may_be_chance() -> None:
    tracker = LoadTracker(0.0, 10.0)
    tracker.observe(report({}), 0.0)
    asked(tracker, 1.0, 20.0, 200)  # eight are expected in eight seconds: none may be chance
    assert asked(tracker, 0.0, 20.0, 240) == math.inf
    assert 0.2 < tracker.tokens_per_s(240.0)[A] < 0.3


def test_a_load_that_comes_back_after_it_was_forgotten_is_told_at_once() -> None:
    tracker = LoadTracker(0.0, 10.0)
    tracker.observe(report({}), 0.0)
    asked(tracker, 50.0, 20.0, 200)
    asked(tracker, 0.0, 20.0, 220)
    asked(tracker, 50.0, 20.0, 223)
    assert tracker.tokens_per_s(223.0)[A] > 25
    asked(tracker, 50.0, 20.0, 400)
    assert tracker.tokens_per_s(400.0)[A] == pytest.approx(50, rel=0.05)
