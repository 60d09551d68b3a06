"""What routers say of silent actors, and when: the signs by which an actor is replaced."""

from __future__ import annotations

import asyncio

import pytest

from cluster.controller.health import suspicion
from cluster.controller.health.liveness import LOOK_S, SILENT_S
from tests.unit.cluster.controller.fakes import Cluster, FakeActor, happens, started

ACTORS = [f"expert-{number}" for number in range(4)]


async def router_calls(cluster: Cluster, *heard: str) -> None:
    """Have the router call once, with the actors that it has just heard."""
    order = cluster.state.placement.order
    told = dict.fromkeys(heard, (1, 0.0))
    await cluster.controller.watch("router", 1, "n", order, 0.0, model="m", heard=told)


async def silent(*actor_ids: str) -> tuple[Cluster, list[FakeActor]]:
    """Start four actors, of which some hang until the controller has given them their time."""
    cluster = await started(4)
    await router_calls(cluster)
    await cluster.controller.suspect("expert-1", 1, True)  # long past, and another one, by then
    actors = [cluster.pool.of(actor_id)[0] for actor_id in actor_ids]
    for actor in actors:
        actor.hung = True
    await asyncio.sleep(SILENT_S - 0.5 if len(actors) == 1 else 2 * SILENT_S)
    assert not any(actor.killed for actor in actors)
    await router_calls(cluster)
    return cluster, actors


async def test_one_silent_actor_is_replaced_as_soon_as_a_router_waits_in_vain() -> None:
    cluster, [actor] = await silent("expert-0")
    await cluster.controller.suspect("expert-0", 1, True)
    await asyncio.sleep(2 * LOOK_S)
    assert actor.killed


@pytest.mark.parametrize("is_heard", [True, False])
async def test_among_many_silent_a_late_suspicion_counts_unless_the_router_takes_it_back(
    is_heard: bool,
) -> None:
    cluster, [first, *_] = await silent(*ACTORS)
    asked_at_s = cluster.state.asked_at_s
    await cluster.controller.suspect("expert-0", 1, True)
    await happens(lambda: cluster.state.asked_at_s > asked_at_s)
    assert not first.killed
    await router_calls(cluster, *(["expert-0"] if is_heard else []))
    await asyncio.sleep(2 * LOOK_S)
    assert first.killed == (not is_heard)


async def test_a_router_that_does_not_call_has_its_time_from_the_first_suspicion_in_a_row() -> None:
    cluster, [first, second, *_] = await silent(*ACTORS)
    suspect = cluster.controller.suspect
    await suspect("expert-1", 1, True)
    await asyncio.sleep(2 * LOOK_S)
    assert not second.killed
    for _ in range(round(suspicion.ANSWER_S / LOOK_S) - 1):  # it repeats it while it waits
        await suspect("expert-0", 1, True)
        await asyncio.sleep(LOOK_S)
        assert not first.killed
    await suspect("expert-0", 1, True)
    await asyncio.sleep(3 * LOOK_S)
    assert first.killed
