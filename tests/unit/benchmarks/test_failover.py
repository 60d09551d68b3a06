"""The failover benchmark's pure parts: what falls into a window, what a kill is compared with."""

from __future__ import annotations

import pytest

from benchmarks.failover import (
    KILL,
    QUIET,
    actor_is_back,
    controller_is_back,
    kills,
    lost_s,
    minute_ratio,
    router_is_back,
    window,
)
from cluster.reports import ActorStatus, ClusterStatus, ProcessStatus
from tests.fault.load import Wait


def status(
    controller: int = 1, router: int = 2, actors: tuple[tuple[int, int], ...] = ((3, 1), (4, 1))
) -> ClusterStatus:
    """A status of these pids; an actor is its pid and generation."""
    told = [ActorStatus(f"expert-{i}", p, "n", "cpu", g, (), 0) for i, (p, g) in enumerate(actors)]
    router_process = ProcessStatus(router, "n")
    return ClusterStatus(
        ("m",), 1, 1, controller, 0, (router_process,), (), tuple(told), 1, int(len(told) == 2)
    )


def test_a_window_has_the_pieces_that_came_in_it_and_the_gaps_that_touch_it() -> None:
    waits = [
        Wait(8.0, 1.5, 1, False),  # before
        Wait(9.5, 1.0, 2, False),
        Wait(10.5, 0.1, 4, True),
        Wait(10.6, 3.0, 8, False),
        Wait(19.9, 2.0, 16, False),  # came after it
        Wait(20.1, 0.1, 32, False),
    ]
    seen = window("w", waits, 10.0, 20.0)
    assert (seen["seconds"], seen["longest_first_s"]) == (10.0, 0.1)
    assert seen["tokens_per_s"] == pytest.approx(1.4)
    assert seen["gap_s"] == {"p50": 2.0, "p99": 3.0, "longest": 3.0}


def pieces(rates: list[int], begin_s: float = 100.0) -> list[Wait]:
    """A piece each second, of as many tokens as that second's rate."""
    return [Wait(begin_s + i - 0.5, 1.0, rate, False) for i, rate in enumerate(rates)]


def test_what_a_stretch_lacks_is_told_in_seconds_of_what_it_had_before_and_after() -> None:
    outside = pieces([1000], 99.0) + pieces([1000], 108.0)
    for rates, lost, beside in (
        ([10] * 8, 0.0, []),
        ([10, 10, 0, 5, 10, 10, 10, 10], 1.5, []),  # a second without a token, and a half
        ([20, 20, 20, 20, 10, 10, 10, 10], 0.0, []),  # a machine that is half as fast later on
        ([10] * 8, 0.0, outside),
    ):
        assert lost_s(pieces(rates) + beside, 100.0, 108.0) == pytest.approx(lost)


def test_a_stretch_with_a_kill_is_compared_with_those_around_it() -> None:
    windows = [
        {"name": name, "gap_s": {"longest": longest_s}, "lost_s": lost}
        for name, longest_s, lost in (
            (QUIET, 0.2, 0.1), (KILL, 0.4, 0.9), (QUIET, 0.3, -0.3), (KILL, 0.2, 0.3),
            (QUIET, 0.1, 0.0),
        )
    ]  # fmt: skip
    told = kills(windows)
    assert [one["lost_s"] for one in told] == [0.9, 0.3]
    assert [one["noise_s"] for one in told] == pytest.approx([-0.1, -0.15])
    assert [one["normal_s"] for one in told] == [0.3, 0.3]
    assert [one["above_s"] for one in told] == pytest.approx([0.1, -0.1])
    assert minute_ratio(told) == pytest.approx(0.99)


def test_a_part_is_back_when_it_has_a_successor_and_nothing_is_missing() -> None:
    before = status()
    for is_back in (actor_is_back, router_is_back, controller_is_back):
        assert not is_back(before, before)
    assert not actor_is_back(before, status(actors=((4, 1),)))
    assert actor_is_back(before, status(actors=((9, 2), (4, 1))))
    assert router_is_back(before, status(router=9))
    assert not controller_is_back(before, status(controller=9, actors=((3, 1),)))
    assert controller_is_back(before, status(controller=9))
    with pytest.raises(RuntimeError, match="has replaced an actor"):
        controller_is_back(before, status(controller=9, actors=((9, 2), (4, 1))))
