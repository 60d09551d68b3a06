"""Requests whose choices have advanced apart, in worlds of their own; few seeds have them.

Each is one that a client resumes: of some choices it has many tokens, of others few or none, and
some have ended. Some of these tokens were not exact. The answers have forms, and begin with pages
that are shared. A router or gateway may die under them, or an actor compute with another kernel
class.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.world.clients import BEGINNINGS, Plan
from tests.world.forms import FORMS
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.weather import Event, Scenario
    from tests.world.world import World

SHARE = 0.06
NUM_REQUESTS, SPREAD_S = 30, 5.0
TIMEOUT_S = 20.0
MIXED_SHARE = 0.3


def with_choices(scenario: Scenario, make: type[Event], begin_s: float) -> Scenario | None:
    """Return a scenario of such requests alone, ``None`` for most seeds.

    It is drawn apart, so that the rest of a seed stays as it is.
    """
    source = random.Random(f"choices-{scenario.seed}")
    if source.random() >= SHARE:
        return None
    plans = [_plan(source, begin_s + source.uniform(0.0, SPREAD_S)) for _ in range(NUM_REQUESTS)]
    is_mixed = source.random() < MIXED_SHARE
    events = [
        make(begin_s + source.uniform(0.5, SPREAD_S), "dies", source.randrange(100), role=role)
        for role in source.choice(((), ("router",), ("router",), ("gateway", "router")))
    ]
    return replace(
        scenario,
        setting=replace(scenario.setting, min_copies=2, num_actors=6, forms=True, mixed=is_mixed),
        plans=tuple(sorted(plans, key=lambda plan: plan.at_s)),
        events=tuple(sorted(events, key=lambda event: event.at_s)),
    )


def _plan(source: random.Random, at_s: float) -> Plan:
    n, max_tokens = source.randrange(1, 4), source.randrange(4, 13)
    received = [source.choice((0, source.randrange(max_tokens), max_tokens)) for _ in range(n)]
    received[source.randrange(n)] = source.randrange(max_tokens)  # not all have ended
    prompt = tuple(source.randrange(VOCAB) for _ in range(source.randrange(1, 6)))
    is_inexact = source.random() < 0.25
    return Plan(
        at_s, 0, (*source.choice(BEGINNINGS), *prompt), max_tokens, TIMEOUT_S, n=n,
        is_streamed=source.random() < 0.7, form=source.choice(FORMS),
        received=tuple(received) if source.random() < 0.7 else (),
        is_inexact=is_inexact, on_expert_loss="next_expert" if is_inexact else "strict",
    )  # fmt: skip


def look_at_pages(world: World) -> None:
    """Look whether routers share pages although some experts have another kernel class."""
    if not world.setting.mixed:
        return
    for replica in world.serve.deployments["router"].running():
        prefixes = replica.handle.instance._scheduler.prefixes
        if prefixes is not None and prefixes.hit_tokens:
            world.law.broken(
                "mixed kernels share no pages",
                f"{replica.process.name} found {prefixes.hit_tokens} tokens",
            )
