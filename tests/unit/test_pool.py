"""What the pool makes of what Ray says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.pool import ExpertPool
from cluster.spec import ActorSpec

LIMIT_S = 10.0


def heartbeat_of(outcomes: list[Any]) -> tuple[Any, list[int]]:
    """Ask an actor whose calls come to these outcomes; returns the last, and the epochs told."""
    told: list[int] = []

    async def remote(epoch: int) -> Any:
        told.append(epoch)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def ask() -> Any:
        handle: Any = SimpleNamespace(heartbeat=SimpleNamespace(remote=remote))
        pool = ExpertPool(ActorSpec("app", (), 0.1, 0.0, 1, 100), object)
        async with asyncio.timeout(LIMIT_S):
            return await pool.heartbeat(handle, 7)

    return asyncio.run(ask()), told


def test_a_heartbeat_that_was_lost_on_its_way_is_sent_again() -> None:
    lost = ActorUnavailableError("lost", b"0" * 16)
    assert heartbeat_of([lost, lost, "report"]) == ("report", [7, 7, 7])


def test_a_dead_actor_is_not_asked_again() -> None:
    with pytest.raises(ActorDiedError):
        heartbeat_of([ActorDiedError(), "report"])
