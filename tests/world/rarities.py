"""Rare weather: what most seeds lack, drawn apart so that the rest of a seed stays as it is.

In most of its seeds a rarity comes alone, for the laws that judge only where little else happens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.world.clients import Plan
from tests.world.model import POISONS, VOCAB

if TYPE_CHECKING:
    from tests.world.weather import Event, Scenario

SHARE = 0.2
"""The share of seeds with a rarity."""
ALONE = 0.7
"""The share of these in which nothing else happens."""
KINDS = (
    "poison raises", "poison ends routers", "poison ends actors", "long prompts",
    "gateway unreachable", "orphaned", "copy stays slow", "node's device raises",
    "controller cut off", "controller starts cut off", "routers die in a redeploy", "clocks apart",
    "streams over TLS", "actor dies again and again", "memory stays full", "many choices",
)  # fmt: skip
LONG_PROMPT, LONG_TOKENS = 180, 40
NUM_LONG, NUM_SHORT = 4, 16
LONG_S = 6.0
FLOOD = "flood of a name"
FLOOD_SHARE = 0.02
"""The share of the other seeds in which one key's name floods the routers, and nothing else
happens."""
NUM_FLOOD, FLOOD_PROMPT, FLOOD_TOKENS = 48, 12, 20
"""Requests at once of one name, about three caches of each of two routers."""
NUM_QUIET, QUIET_S = 40, 2.0
"""Requests of other names, and how soon after the flood."""
NUM_BESIDE = 8
"""The requests that are computed beside a poisoned one."""
POISON_TIMEOUT_S = 20.0
NUM_MANY, CHOICES = 64, 12
"""Requests at once of many choices each, which are more than two routers let wait."""
SLOW_S, TIMES_SLOW, NUM_LOAD = 8.0, 3.5, 60
"""How long a copy stays slow, how slow, and how many requests come meanwhile."""

_CUT = (0, LONG_S, 0.0, ())
_DIES = (0, 0.0, 0.0, ())
_SERIES: dict[str, list[tuple[Any, ...]]] = {
    "controller cut off": [(0.0, "controller cut off", *_CUT)],
    "controller starts cut off": [
        (0.0, "dies", *_DIES, "controller"),
        (0.82, "controller cut off", *_CUT),
    ],
    "routers die in a redeploy": [(0.0, "routers die in a redeploy", 0, 1.5)],
    "clocks apart": [(0.0, "clock jumps", 0, 0.0, -3600.0), (0.1, "clock jumps", 1, 0.0, -1800.0)],
}
"""Events that follow each other: after how many seconds, and the fields of each."""


@dataclass(frozen=True)
class Rarity:
    """A few events, and the requests that belong to them."""

    events: tuple[Event, ...]
    plans: tuple[Plan, ...]
    is_alone: bool


def draw_rarity(seed: int, make: type[Event], begin_s: float, calm_s: float) -> Rarity | None:
    source = random.Random(f"rarity-{seed}")
    if source.random() >= SHARE:
        return None
    kind = source.choice(KINDS)
    at_s = source.uniform(begin_s + 1.0, calm_s - 7.0)
    is_alone = source.random() < ALONE
    if kind in ("gateway unreachable", "node's device raises", "actor dies again and again"):
        event = make(at_s, kind, source.randrange(100), for_s=LONG_S)
        return Rarity((event,), (), is_alone)
    if kind.startswith("poison"):
        return Rarity((make(at_s, kind),), tuple(_poison(source, kind, at_s)), is_alone)
    if kind == "memory stays full":  # no other node may be lost
        return Rarity((make(at_s, kind, source.randrange(100)),), (), is_alone=True)
    if kind == "streams over TLS":
        return Rarity((make(at_s, kind),), tuple(_load(source, at_s, 12, 20)), is_alone=True)
    if kind == "copy stays slow":
        at_s = calm_s - SLOW_S
        event = make(at_s, kind, source.randrange(100), SLOW_S, TIMES_SLOW)
        return Rarity((event,), tuple(_load(source, at_s)), is_alone)
    if kind in _SERIES:
        events = tuple(make(at_s + later_s, *what) for later_s, *what in _SERIES[kind])
        return Rarity(events, tuple(_load(source, at_s)), is_alone)
    event = make(at_s, kind, source.randrange(100))
    if kind == "many choices":
        return Rarity((event,), tuple(_many(source, at_s)), is_alone)
    found = tuple(_long(source, at_s)) if kind == "long prompts" else ()
    return Rarity((event,), found, is_alone)


def draw_flood(seed: int, make: type[Event], begin_s: float) -> Rarity | None:
    """Draw a flood of one key's name; few seeds have one.

    It is drawn apart, so that the rest of a seed stays as it is.
    """
    source = random.Random(f"flood-{seed}")
    if source.random() >= FLOOD_SHARE:
        return None
    at_s = begin_s + source.uniform(2.0, 4.0)
    flood = [
        _request(source, at_s + 0.001 * i, FLOOD_PROMPT, FLOOD_TOKENS, 40.0)
        for i in range(NUM_FLOOD)
    ]
    quiet = [
        replace(
            _request(source, at_s + source.uniform(0.1, QUIET_S), 3, 2, 20.0),
            tenant=f"client {source.randrange(NUM_BESIDE)}",
        )
        for _ in range(NUM_QUIET)
    ]
    plans = (*(replace(plan, tenant="flood") for plan in flood), *quiet)
    return Rarity((make(at_s, FLOOD),), plans, is_alone=True)


def with_rarity(scenario: Scenario, rarity: Rarity) -> Scenario:
    """Return a scenario with a rarity, or with nothing else."""
    before = () if rarity.is_alone else scenario.events
    setting = scenario.setting
    if rarity.events[0].kind not in ("poison raises", "long prompts", "orphaned"):
        setting = replace(setting, min_copies=2, num_actors=6)
    if rarity.events[0].kind == "copy stays slow":
        setting = replace(setting, transport="auto", rebalance_period_s=None, autoscales=False)
    if rarity.events[0].kind == "streams over TLS":
        setting = replace(setting, tls=True, transport="stream")
    plans = scenario.plans
    if rarity.events[0].kind == FLOOD:
        plans = tuple(replace(plan, tenant=f"client {plan.client}") for plan in plans)
    return replace(
        scenario,
        setting=setting,
        events=tuple(sorted((*before, *rarity.events), key=lambda event: event.at_s)),
        plans=tuple(sorted((*plans, *rarity.plans), key=lambda plan: plan.at_s)),
    )


def _poison(source: random.Random, kind: str, at_s: float) -> list[Plan]:
    """Return a poisoned request among others, which are in its batch."""
    prompt = (source.randrange(VOCAB), POISONS[kind], source.randrange(VOCAB))
    others = [_request(source, at_s - 0.1, 3, 10, 10.0) for _ in range(NUM_BESIDE)]
    return [Plan(at_s, 0, prompt, 4, POISON_TIMEOUT_S), *others]


def _long(source: random.Random, at_s: float) -> list[Plan]:
    """Return a few requests that fill a router's cache each, and short ones behind them."""
    plans = [_request(source, at_s, LONG_PROMPT, LONG_TOKENS, 40.0) for _ in range(NUM_LONG)]
    later_s = [at_s + 0.1 + 2.0 * source.random() for _ in range(NUM_SHORT)]
    return plans + [_request(source, when_s, 3, 2, 10.0) for when_s in later_s]


def _many(source: random.Random, at_s: float) -> list[Plan]:
    plans = [_request(source, at_s + 0.001 * i, 2, 2, 20.0) for i in range(NUM_MANY)]
    return [replace(plan, n=CHOICES) for plan in plans]


def _load(
    source: random.Random, at_s: float, length: int = 3, number: int = NUM_LOAD
) -> list[Plan]:
    """Return requests that keep all actors busy for :data:`SLOW_S`."""
    return [_request(source, at_s + i * SLOW_S / number, length, 10, 10.0) for i in range(number)]


def _request(
    source: random.Random, at_s: float, length: int, num_tokens: int, timeout_s: float
) -> Plan:
    prompt = tuple(source.randrange(VOCAB) for _ in range(length))
    return Plan(at_s, 0, prompt, num_tokens, timeout_s)
