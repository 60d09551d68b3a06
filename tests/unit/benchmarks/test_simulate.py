"""The simulation of rebalancing: the controller's own functions against traces."""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks.simulate import TRACES, Outcome, Simulation


def played(trace: str, steps: int = 12) -> Outcome:
    simulation = Simulation(Namespace(devices=16, layers=2, experts=16, slots=4, period=10.0))
    return simulation.run(TRACES[trace], steps, 3, lambda step: None)


def test_an_even_load_moves_nothing() -> None:
    outcome = played("even")
    assert (outcome.plans, sum(outcome.moved_bytes)) == (0, 0)
    assert outcome.balanced == outcome.static


@pytest.mark.parametrize("trace", ["zipf", "drifting", "flash crowd", "node lost"])
def test_copies_that_follow_the_load_are_more_balanced_than_those_that_do_not(trace: str) -> None:
    told = played(trace).to_json()
    assert told["balance"] < 0.7 * told["static_balance"]
    assert told["first_gb"] > 0


def test_a_steady_load_is_balanced_once_and_a_drifting_one_again() -> None:
    assert played("zipf").plans == 1
    assert played("drifting").plans > 1


def test_the_same_seed_gives_the_same_figures() -> None:
    first, second = (played("drifting", 5) for _ in range(2))
    assert (first.balanced, first.moved_bytes) == (second.balanced, second.moved_bytes)


def test_what_a_lost_node_held_is_loaded_elsewhere() -> None:
    outcome = played("node lost")
    assert outcome.moved_bytes[10] > 0
