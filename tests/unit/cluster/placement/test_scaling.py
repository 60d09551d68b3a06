"""How many actors the load asks for: hand-worked cases and properties, by the test's own clock."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement.scaling import HYSTERESIS, BusyMeter, ScalingPolicy, Signals, wanted_actors
from cluster.spec import ActorReport, ExpertKey, ScalingTargets

TARGETS = ScalingTargets(
    min_actors=1,
    max_actors=10,
    target_busy=0.5,
    target_queue_s=0.010,
    upscale_delay_s=3.0,
    downscale_delay_s=20.0,
)


def report(
    actor_id: str, busy_s: float, frames: int = 0, waited_s: float = 0.0, generation: int = 1
) -> ActorReport:
    experts = (ExpertKey("m", 0, 0),)
    return ActorReport(
        actor_id, generation, "", 1, 1, "node", "cpu", experts, 20, {}, 0, 0, frames, busy_s,
        waited_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("actors", "busy_devices", "queue_s", "expected"),
    [
        (4, 2.0, 0.0, 4),  # just at the target
        (4, 2.01, 0.0, 5),
        (4, 4.0, 0.0, 8),  # no device rests: twice as many would be at the target
        (4, 8.0, 0.0, 10),  # bounded; never the 16 that the load asks for
        (4, 1.7, 0.0, 4),  # three would be at 57 %, above the target
        (4, 1.4, 0.0, 4),  # three would be at 47 %, too near to it
        (4, 1.34, 0.0, 3),  # three at 44.7 %, below nine tenths of it
        (4, 0.0, 0.0, 1),
        (1, 0.0, 0.0, 1),
        (4, 1.0, 0.011, 5),  # devices are idle, but frames wait
        (4, 4.0, 0.011, 8),  # both: the larger
        (4, 1.0, 0.006, 4),  # frames wait nearly long enough: nobody goes
        (10, 9.0, 1.0, 10),
    ],
)
def test_the_number_follows_busy_time_and_queue_time(
    actors: int, busy_devices: float, queue_s: float, expected: int
) -> None:
    assert wanted_actors(TARGETS, actors, Signals(busy_devices, queue_s)).actors == expected


def test_every_wish_says_what_it_is_for_and_is_bounded() -> None:
    assert wanted_actors(TARGETS, 4, Signals(8.0, 0.0123)).reason == (
        "busy 200% (target 50%), would be 16 actors, frames wait 12.3 ms (10.0)"
    )
    fixed = ScalingPolicy(replace(TARGETS, min_actors=3, max_actors=3))
    for second in range(100):
        assert fixed.decide(3, Signals(3.0 * (second % 2), 0.1), float(second)) is None


def test_actors_go_later_than_they_come() -> None:
    policy = ScalingPolicy(TARGETS)
    assert [policy.decide(4, Signals(0.1, 0.0), float(s)) for s in range(20)] == [None] * 20
    wanted = policy.decide(4, Signals(0.1, 0.0), 20.0)
    assert wanted is not None
    assert wanted.actors == 1
    # A wish that changed nothing is decided again after another delay.
    decided = [s for s in range(21, 65) if policy.decide(4, Signals(0.1, 0.0), float(s))]
    assert decided == [40, 60]
    # More being wanted in between begins the delay anew, and has its own.
    policy = ScalingPolicy(TARGETS)
    assert policy.decide(4, Signals(0.1, 0.0), 30.0) is None
    assert policy.decide(4, Signals(4.0, 0.0), 40.0) is None
    assert policy.decide(4, Signals(0.1, 0.0), 42.0) is None
    assert policy.decide(4, Signals(0.1, 0.0), 61.9) is None
    assert policy.decide(4, Signals(0.1, 0.0), 62.0) is not None


def test_without_signals_nothing_happens_but_bounds_hold() -> None:
    policy = ScalingPolicy(TARGETS)
    assert policy.decide(4, Signals(4.0, 0.0), 0.0) is None
    assert policy.decide(4, None, 4.0) is None
    assert policy.decide(4, Signals(4.0, 0.0), 5.0) is None  # waited for anew
    fewer = ScalingPolicy(TARGETS)
    decided = [fewer.decide(4, Signals(0.1, 0.0), at_s) for at_s in (0.0, 21.0, 40.9, 41.0)]
    assert [one is not None for one in decided] == [False, False, False, True]
    too_many, too_few = policy.decide(12, None, 6.0), policy.decide(0, None, 6.0)
    assert too_many is not None
    assert too_few is not None
    assert (too_many.actors, too_few.actors) == (10, 1)
    assert too_many.reason == "12 actors are out of bounds"


signals = st.builds(Signals, st.floats(0, 20), st.floats(0, 0.05))


@given(st.integers(1, 10), signals)
def test_what_is_wanted_is_within_bounds_and_enough(actors: int, told: Signals) -> None:
    wanted = wanted_actors(TARGETS, actors, told).actors
    assert TARGETS.min_actors <= wanted <= TARGETS.max_actors
    needed = told.busy_devices / TARGETS.target_busy
    assert wanted >= min(math.floor(needed), TARGETS.max_actors)
    if wanted < actors:
        assert told.busy_devices / wanted <= TARGETS.target_busy * (1 - HYSTERESIS) + 1e-6
        assert told.queue_s <= TARGETS.target_queue_s


@given(st.integers(1, 10), st.floats(0, 20))
def test_a_steady_load_is_answered_once_and_then_left_alone(actors: int, busy: float) -> None:
    policy, now_s, changes = ScalingPolicy(TARGETS), 0.0, []
    for _ in range(200):
        now_s += 1.0
        wanted = policy.decide(actors, Signals(busy, 0.0), now_s)
        if wanted is not None:
            actors = wanted.actors
            changes.append(actors)
    assert len(changes) <= 1


@given(st.lists(signals, min_size=1, max_size=300), st.integers(1, 10))
def test_never_fewer_than_were_wanted_in_the_delay_and_more_only_after_theirs(
    told: list[Signals], actors: int
) -> None:
    policy, last_s, wishes = ScalingPolicy(TARGETS), 0.0, [10]
    for second, one in enumerate(told):
        wishes.append(wanted_actors(TARGETS, actors, one).actors)
        wanted = policy.decide(actors, one, float(second))
        if wanted is None:
            # A step down that is due is made: who may go are those whom no second of twenty wanted.
            assert second < 20 or max(wishes[-21:]) >= actors
            continue
        if wanted.actors > actors:
            assert second - last_s >= 3.0
            assert wanted.actors == min(wishes[-4:])
        else:
            assert second >= 20
            assert wanted.actors == max(wishes[-20:])
        actors, last_s = wanted.actors, float(second)


def test_busy_time_is_that_of_the_last_seconds() -> None:
    meter = BusyMeter()
    assert meter.signals(["a"]) is None
    for second in range(2):
        meter.observe(
            report("a", 100.0 + second / 2, 1000 + second * 10, 50.0 + second / 10), second
        )
        assert meter.signals(["a"]) is None  # not known for long enough
    meter.observe(report("a", 101.0, 1020, 50.2), 2.0)
    assert meter.signals(["a"]) == Signals(pytest.approx(0.5), pytest.approx(0.01))
    for second in range(3, 20):  # from now on it never rests
        meter.observe(report("a", 99.0 + second, 1020, 50.2), float(second))
    assert meter.signals(["a"]) == Signals(pytest.approx(1.0), 0.0)


def test_busy_time_is_also_told_over_a_shorter_time() -> None:
    meter = BusyMeter()
    for place in range(9):  # at rest for a second, and busy all through the next one
        at_s = place / 4
        meter.observe(report("a", max(at_s - 1.0, 0.0)), at_s)
    assert meter.signals(["a"]) == Signals(pytest.approx(0.5), 0.0)
    assert meter.signals(["a"], 1.0) == Signals(pytest.approx(1.0), 0.0)
    assert meter.signals(["a"], 1.2) == Signals(pytest.approx(0.8), 0.0)


def test_that_fewer_go_is_decided_so_long_before_the_delay_is_over() -> None:
    busy, idle = Signals(2.0, 0.0), Signals(0.1, 0.0)
    for ahead_s, first_s in ((0.0, 21), (2.0, 19), (60.0, 1)):
        policy = ScalingPolicy(TARGETS, ahead_s)
        for second in range(-20, 1):
            assert policy.decide(4, busy, float(second)) is None
        went = [at for at in range(1, 30) if policy.decide(4, idle, float(at)) is not None]
        assert went[0] == first_s


def test_who_may_go_may_do_so_before_the_next_whole_signals() -> None:
    policy, recent = ScalingPolicy(TARGETS), Signals(0.1, 0.0)
    for second in range(21):
        assert policy.decide(4, Signals(2.0 if second < 2 else 0.1, 0.0), float(second)) is None
    assert policy.decide(4, None, 30.0) is None
    assert policy.decide(4, None, 30.0, recent) is not None


def test_more_actors_come_by_the_recent_load_and_do_not_go_at_once() -> None:
    policy, usual, recent = ScalingPolicy(TARGETS), Signals(1.9, 0.0), Signals(4.0, 0.0)
    for second in range(30):  # long enough that fewer might go
        assert policy.decide(4, usual, float(second), usual) is None
    assert [policy.decide(4, usual, at_s, recent) for at_s in (30.0, 31.0, 32.0)] == [None] * 3
    more = policy.decide(4, usual, 33.0, recent)
    assert more is not None
    assert more.actors == 8
    for second in range(34, 54):  # that 8 were wanted holds until 34, when the next wish comes
        assert policy.decide(8, usual, float(second), usual) is None
    fewer = policy.decide(8, usual, 54.0, usual)
    assert fewer is not None
    assert fewer.actors == 5


def test_devices_add_up_and_the_longest_wait_counts() -> None:
    meter = BusyMeter()
    for actor_id, busy_s, waited_s in (("a", 0.25, 0.02), ("b", 0.5, 0.3), ("c", 0.1, 0.0)):
        meter.observe(report(actor_id, 0.0), 0.0)
        meter.observe(report(actor_id, 2 * busy_s, 10, waited_s), 2.0)
    assert meter.signals(["a", "b"]) == Signals(pytest.approx(0.75), pytest.approx(0.03))
    assert meter.signals([]) == Signals(0.0, 0.0)
    meter.forget("b")
    assert meter.signals(["a", "b"]) is None
    assert meter.signals(["a"]) is not None
    meter.restart()
    assert meter.signals(["a"]) is None


def test_what_an_actor_did_before_it_left_its_pool_counts_until_it_is_past() -> None:
    meter = BusyMeter()
    for place in range(9):  # half of the time and all of it
        meter.observe(report("a", 0.5 * place / 4), place / 4)
        meter.observe(report("b", place / 4), place / 4)
    assert meter.signals(["a", "b"], pool="p") == Signals(pytest.approx(1.5), 0.0)
    meter.leave("b", "p")
    meter.leave("never seen", "p")
    assert meter.signals(["a"], pool="p") == Signals(pytest.approx(1.5), 0.0)
    assert meter.signals(["a"], 1.0, "p") == Signals(pytest.approx(1.5), 0.0)
    assert meter.signals(["a"], pool="other") == Signals(pytest.approx(0.5), 0.0)
    busy = []
    for place in range(9, 21):  # the other one does all of it now
        meter.observe(report("a", 1.0 + (place - 8) / 4), place / 4)
        signals = meter.signals(["a"], pool="p")
        assert signals is not None
        busy.append(signals.busy_devices)
    expected = [0.5 + place / 16 + 1 - place / 8 for place in range(1, 9)] + [1.0] * 4
    assert busy == pytest.approx(expected)
    assert meter._gone == []


def test_counters_of_another_generation_are_another_actors() -> None:
    meter = BusyMeter()
    meter.observe(report("a", 50.0), 0.0)
    meter.observe(report("a", 0.0, generation=2), 2.0)
    assert meter.signals(["a"]) is None
    meter.observe(report("a", 0.5, generation=2), 4.0)
    assert meter.signals(["a"]) == Signals(pytest.approx(0.25), 0.0)
