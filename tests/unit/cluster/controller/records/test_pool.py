"""What the pool makes of what Ray says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

import cluster.controller.records.pool as pool_module
from cluster.controller.records.pool import ExpertPool, actor_options, shortage
from cluster.errors import StaleEpochError
from cluster.spec import ActorSpec

LIMIT_S = 60.0


def heartbeat_of(outcomes: list[Any]) -> tuple[Any, list[int]]:
    """Ask an actor whose calls come to these outcomes; returns the last, and the epochs sent."""
    sent: list[int] = []

    async def remote(epoch: int) -> Any:
        sent.append(epoch)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def ask() -> Any:
        handle: Any = SimpleNamespace(heartbeat=SimpleNamespace(remote=remote))
        pool = ExpertPool("app", object)
        async with asyncio.timeout(LIMIT_S):
            return await pool.heartbeat(handle, 7)

    return asyncio.run(ask()), sent


def test_a_heartbeat_that_was_lost_on_its_way_is_sent_again() -> None:
    lost = ActorUnavailableError("lost", b"0" * 16)
    assert heartbeat_of([lost, lost, "report"]) == ("report", [7, 7, 7])


def test_a_dead_actor_is_not_asked_again() -> None:
    with pytest.raises(ActorDiedError):
        heartbeat_of([ActorDiedError(), "report"])


def test_what_an_actor_raises_comes_without_rays_wrapper() -> None:
    own = StaleEpochError("is older than 8", "epoch")
    with pytest.raises(StaleEpochError) as caught:
        heartbeat_of([RayTaskError("heartbeat", "stack", own).as_instanceof_cause()])
    assert caught.value is own


def test_an_actor_reserves_what_its_pool_says() -> None:
    spec = ActorSpec("app", (), 1.5, 0.5, 1, 100, resources={"big": 1})
    options = actor_options(spec, "name")
    assert (options["num_cpus"], options["num_gpus"], options["resources"]) == (
        1.5,
        0.5,
        {"big": 1},
    )


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


def test_what_an_actor_waits_for_is_told() -> None:
    needed = {"CPU": 2.0, "GPU": 1.0}
    nodes = [node(CPU=8.0), node(CPU=1.0, GPU=1.0), node(False, CPU=8.0, GPU=8.0)]
    assert (
        shortage(needed, nodes[:1]) == "it needs CPU 2, GPU 1; none of the 1 nodes has enough GPU"
    )
    assert shortage(needed, nodes) == (
        "it needs CPU 2, GPU 1; none of the 2 nodes has all of these"
    )
    assert shortage(needed, [*nodes, node(CPU=2.0, GPU=1.0)]) == (
        "it needs CPU 2, GPU 1, which is in use on all nodes that have it (1)"
    )


def test_a_node_without_free_room_is_no_place_to_move_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, spec = ExpertPool("app", object), ActorSpec("app", (), 1.5, 0.0, 1, 100)
    nodes = [
        {"NodeID": name} | node(alive, CPU=cpus)
        for name, alive, cpus in [
            ("free", True, 4),
            ("full", True, 4),
            ("dead", False, 4),
            ("leaving", True, 4),
        ]
    ]
    monkeypatch.setattr(pool_module.ray, "nodes", lambda: nodes)
    free = {
        "free": {"CPU": 1.5},
        "full": {"CPU": 1.0},
        "dead": {"CPU": 4.0},
        "leaving": {"CPU": 4.0},
    }
    monkeypatch.setattr(pool_module, "free_resources", lambda: free)
    monkeypatch.setattr(pool_module, "draining_nodes", lambda: {"leaving"})
    assert pool.nodes_for(spec) == ["free"]
