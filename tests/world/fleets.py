"""Weather of fleets, in worlds of its own: nodes that drain or join under load.

A drain may fail where no other node has memory, may find an actor on standby, or a copy may end
while it lasts. It is drawn apart, so that the rest of a seed stays as it is.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.world.clients import Plan
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.weather import Event, Scenario

SHARE = 0.08
KINDS = ("drain", "failed drain", "standby", "standby", "copy ends", "moves apart", "returns")
NUM_REQUESTS, LOAD_S = 60, 10.0
TIMEOUT_S = 10.0
FULL_S = 6.0
"""How long other nodes have no memory: less than a drained node stays."""
HANGS_S = 2.0
"""When and how long a router hangs, so that it does not learn which actors are about to move."""
RETURNS_S = 2.0
"""How long the devices of a node fail; an actor ends before and after that."""


def with_fleet(scenario: Scenario, make: type[Event], begin_s: float) -> Scenario | None:
    """Return a scenario of such weather alone, ``None`` for most seeds."""
    source = random.Random(f"fleet-{scenario.seed}")
    if source.random() >= SHARE:
        return None
    kind, node = source.choice(KINDS), source.randrange(3)
    at_s = begin_s + source.uniform(0.5, 1.5)
    if kind == "moves apart":  # at first all copies share the only node
        events = [make(at_s, "node added")]
        events.append(make(begin_s + HANGS_S, "hangs", node, HANGS_S, role="router"))
    elif kind == "returns":  # a new node has the most room; later another is avoided
        dies_s = at_s + RETURNS_S / 2, at_s + 3 * RETURNS_S
        events = [make(s, "dies", source.randrange(100), role="actor") for s in dies_s]
        events.append(make(at_s + RETURNS_S, "node's device raises", node, for_s=RETURNS_S))
        events.append(make(at_s, "node added"))
    else:
        events = [make(at_s, "node drains", node)]
    if kind == "failed drain":
        others = [other for other in range(3) if other != node]
        events += [make(at_s - 0.1, "memory full", other, for_s=FULL_S) for other in others]
    if kind == "copy ends":
        later_s = source.uniform(0.0, 3.0)
        events.append(make(at_s + later_s, "dies", source.randrange(100), role="actor"))
    plans = [_plan(source, at_s + LOAD_S * i / NUM_REQUESTS) for i in range(NUM_REQUESTS)]
    setting = replace(
        scenario.setting, num_nodes=1 if kind == "moves apart" else 3, num_actors=6, min_copies=2,
        rebalance_period_s=None, autoscales=kind == "standby", standby=2 * (kind == "standby"),
    )  # fmt: skip
    events.sort(key=lambda event: event.at_s)
    return replace(scenario, setting=setting, plans=tuple(plans), events=tuple(events))


def _plan(source: random.Random, at_s: float) -> Plan:
    prompt = tuple(source.randrange(VOCAB) for _ in range(3))
    return Plan(at_s, 0, prompt, 8, TIMEOUT_S)
