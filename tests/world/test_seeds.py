"""Worlds of many seeds break no law."""

from __future__ import annotations

from time import perf_counter

import pytest

from tests.world.many import all_of, workers
from tests.world.weather import FIRST_LONG

SEEDS = [*range(96), *range(FIRST_LONG, FIRST_LONG + 4)]
"""Hundreds more are in ``tests/long/test_seeds.py``."""
PROCESSES = 2
LIMIT_S = 1200.0
"""For a machine that does much else. What the seeds cost is counted, not timed."""
MAX_CALLBACKS = 300
"""How many callbacks a request may take, with all that goes on beside it."""


@pytest.mark.timeout(1500)
def test_seeds_break_no_law() -> None:
    with workers(PROCESSES) as pool:
        found = list(all_of(pool, PROCESSES, iter(SEEDS), perf_counter() + LIMIT_S))
    assert {one.seed: one.breaches for one in found if one.breaches} == {}
    assert sorted(one.seed for one in found) == SEEDS
    assert sum(len(one.hit) for one in found) > 2 * len(SEEDS), "the weather is too fine"
    most = MAX_CALLBACKS * sum(one.num_requests for one in found)
    assert sum(one.num_callbacks for one in found) < most
