"""The failover benchmark's pure parts: what falls into a window, what a kill is compared with."""

from __future__ import annotations

from typing import Any

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
    whole = [10] * 8
    assert lost_s(pieces(whole), 100.0, 108.0) == pytest.approx(0.0)
    # A second without a token and one of half as many.
    assert lost_s(pieces([10, 10, 0, 5, 10, 10, 10, 10]), 100.0, 108.0) == pytest.approx(1.5)
    # A machine that is half as fast later on.
    assert lost_s(pieces([20, 20, 20, 20, 10, 10, 10, 10]), 100.0, 108.0) == pytest.approx(0.0)
    # What is outside does not count.
    outside = pieces([1000], 99.0) + pieces([1000], 108.0)
    assert lost_s(pieces(whole) + outside, 100.0, 108.0) == pytest.approx(0.0)


def a_window(name: str, longest_s: float, lost_s: float) -> dict[str, Any]:
    return {"name": name, "gap_s": {"longest": longest_s}, "lost_s": lost_s}


def test_a_stretch_with_a_kill_is_compared_with_those_around_it() -> None:
    windows = [
        a_window(QUIET, 0.2, 0.1),
        a_window(KILL, 0.4, 0.9),
        a_window(QUIET, 0.3, -0.3),
        a_window(KILL, 0.2, 0.3),
        a_window(QUIET, 0.1, 0.0),
    ]
    told = kills(windows)
    assert [one["lost_s"] for one in told] == [0.9, 0.3]
    assert [one["noise_s"] for one in told] == pytest.approx([-0.1, -0.15])
    assert [one["normal_s"] for one in told] == [0.3, 0.3]
    assert [one["above_s"] for one in told] == pytest.approx([0.1, -0.1])
    assert minute_ratio(told) == pytest.approx(0.99)


def test_a_part_is_back_when_it_has_a_successor_and_nothing_is_missing() -> None:
    before = status()
    assert not actor_is_back(before, before)
    assert not actor_is_back(before, status(actors=((4, 1),)))
    assert actor_is_back(before, status(actors=((9, 2), (4, 1))))
    assert not router_is_back(before, before)
    assert router_is_back(before, status(router=9))


def test_a_controller_is_back_with_all_actors_and_must_not_have_replaced_one() -> None:
    before = status()
    assert not controller_is_back(before, before)
    assert not controller_is_back(before, status(controller=9, actors=((3, 1),)))
    assert controller_is_back(before, status(controller=9))
    with pytest.raises(RuntimeError, match="has replaced an actor"):
        controller_is_back(before, status(controller=9, actors=((9, 2), (4, 1))))
