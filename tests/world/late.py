"""Weather of what comes late, for long seeds: a remedy that must end, or begin again, in time.

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

SHARE = 0.4
KINDS = ("forgiven actor", "endless deaths", "slow once", "forgiven node")
TIMEOUT_S = 10.0
DEATHS_S, ENDLESS_S, CALM_S = 5.0, 130.0, 210.0
"""How long an actor dies again and again, and how long the weather of the longest lasts."""
SLOW_S, TIMES_SLOW = 2.2, 300.0
"""How long a copy is so slow that its calls time out, which is too short to replace it."""
BAD_S = 6.0
"""How long the devices of a node fail."""


def with_late(scenario: Scenario, make: type[Event], begin_s: float) -> Scenario | None:
    """Return a scenario of such weather alone, ``None`` for many seeds."""
    source = random.Random(f"late-{scenario.seed}")
    if source.random() >= SHARE:
        return None
    kind, what = source.choice(KINDS), source.randrange(100)
    at_s, end_s = begin_s + source.uniform(1.0, 2.0), scenario.setting.calm_s - 5.0
    setting = replace(
        scenario.setting, num_actors=6, min_copies=2, rebalance_period_s=None, autoscales=False,
        transport="auto",
    )  # fmt: skip
    plans = _trickle(source, at_s, end_s)
    if kind == "forgiven actor":
        events = [make(at_s, "actor dies again and again", what, DEATHS_S)]
        events.append(make(end_s, "dies", what, role="actor"))
    elif kind == "endless deaths":
        setting = replace(setting, calm_s=CALM_S)
        events = [make(at_s, "actor dies again and again", what, ENDLESS_S)]
    elif kind == "slow once":
        events = [make(at_s, "slow once", what, SLOW_S, TIMES_SLOW)]
        plans += [_plan(source, source.uniform(at_s - 1.0, at_s + 40.0)) for _ in range(400)]
    else:  # one actor a node, so that a node is blamed once
        setting = replace(setting, num_actors=3, min_copies=1)
        events = [make(at_s, "node's device raises", what, for_s=BAD_S)]
        events.append(make(end_s, "dies", what, role="actor"))
    plans.sort(key=lambda plan: plan.at_s)
    return replace(scenario, setting=setting, plans=tuple(plans), events=tuple(events))


def _trickle(source: random.Random, from_s: float, until_s: float) -> list[Plan]:
    """Return a request every other second, so that actors work."""
    return [_plan(source, from_s + 2.0 * i) for i in range(int((until_s - from_s) / 2.0))]


def _plan(source: random.Random, at_s: float) -> Plan:
    return Plan(at_s, 0, tuple(source.randrange(VOCAB) for _ in range(3)), 4, TIMEOUT_S)
