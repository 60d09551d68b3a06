"""The memory of router and actors on a device against what ``expertmesh plan`` says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.ops.plan.plan import Wish, make_plan
from router.ops.plan.source import find_model


@dataclass(frozen=True, slots=True)
class Planned:
    """The bytes that a plan gives a router and the fullest actor on a device."""

    router_bytes: int
    actor_bytes: int


def planned(folder: Path, actors: int, cache_tokens: int) -> Planned:
    """Return the plan for a checkpoint with so many actors and a cache of so many tokens.

    This is the one place that knows which figures of a plan are the device's: weights and cache of
    a router, weights of an actor. The processes' own memory is the host's.
    """
    plan = make_plan(find_model(str(folder)), Wish(devices=actors))
    assert plan.needed_device_bytes is not None
    return Planned(
        router_bytes=plan.router_weight_bytes + cache_tokens * plan.cache_token_bytes,
        actor_bytes=plan.needed_device_bytes - plan.actor_bytes_without_experts,
    )


def compared(plan: Planned, measured: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return of each process the bytes that it had, those of the plan, and their ratio."""
    found = {}
    for process, num_bytes in measured.items():
        of_plan = plan.router_bytes if process == "router" else plan.actor_bytes
        found[process] = {
            "peak_bytes": num_bytes,
            "planned_bytes": of_plan,
            "ratio": num_bytes / of_plan,
        }
    return found
