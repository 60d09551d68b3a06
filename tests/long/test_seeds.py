"""Worlds of more seeds than ``tests/world/test_seeds.py`` has time for break no law."""

from __future__ import annotations

from time import perf_counter

import pytest

from tests.world.many import all_of, workers

SEEDS = range(100, 500)
PROCESSES = 2
LIMIT_S = 1600.0


@pytest.mark.timeout(1800)
def test_more_seeds_break_no_law() -> None:
    with workers(PROCESSES) as pool:
        found = list(all_of(pool, PROCESSES, iter(SEEDS), perf_counter() + LIMIT_S))
    assert {one.seed: one.breaches for one in found if one.breaches} == {}
    assert sorted(one.seed for one in found) == list(SEEDS)
