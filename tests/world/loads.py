"""Weather of load, in worlds of its own: routers that are full in turn, a copy that is new.

It is drawn apart, so that the rest of a seed stays as it is.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.world.clients import Plan
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.weather import Event, Scenario

SHARE = 0.02
FULL = "router full"
NUM_BURSTS, BURST_S = 5, 1.5
CHOICES, GATEWAYS = 32, 4
"""The choices of each of two requests at once: a router has room for those of one."""
NUM_REQUESTS, LOAD_S, TOKENS = 150, 9.0, 4
TIMEOUT_S = 20.0


def with_load(scenario: Scenario, make: type[Event], begin_s: float) -> Scenario | None:
    """Return a scenario of such weather alone, ``None`` for most seeds."""
    source = random.Random(f"load-{scenario.seed}")
    if source.random() >= SHARE:
        return None
    at_s = begin_s + source.uniform(0.5, 1.0)
    setting = replace(
        scenario.setting, num_actors=6, min_copies=2, rebalance_period_s=None, autoscales=False,
        transport="auto",
    )  # fmt: skip
    if source.random() < 0.5:
        event = make(at_s, FULL)
        setting = replace(setting, num_gateways=GATEWAYS)
        times_s = [at_s + BURST_S * (i // 2) for i in range(2 * NUM_BURSTS)]
        plans = [replace(_plan(source, each_s, 2), n=CHOICES) for each_s in times_s]
    else:
        event = make(at_s, "dies", source.randrange(100), role="actor")
        times_s = [at_s + i * LOAD_S / NUM_REQUESTS for i in range(NUM_REQUESTS)]
        plans = [_plan(source, each_s, TOKENS) for each_s in times_s]
    return replace(scenario, setting=setting, plans=tuple(plans), events=(event,))


def _plan(source: random.Random, at_s: float, num_tokens: int) -> Plan:
    prompt = tuple(source.randrange(VOCAB) for _ in range(3))
    return Plan(at_s, 0, prompt, num_tokens, TIMEOUT_S)
