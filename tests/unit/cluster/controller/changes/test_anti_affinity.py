"""Copies over a fake pool with several nodes: they survive a loss, and sit on different nodes."""

from __future__ import annotations

import pytest

from cluster.controller.changes import anti_affinity
from cluster.controller.health.deaths import Deaths
from cluster.controller.records import members
from cluster.spec import ActorReport
from tests.unit.cluster.controller.fakes import (
    FakeActor,
    FakePool,
    away,
    happens,
    started,
)

pytestmark = pytest.mark.usefixtures("short_periods")


async def test_the_loss_of_one_of_two_copies_leaves_every_expert_placed() -> None:
    cluster = await started(3, min_copies=2)
    before = cluster.state.placement
    assert all(len(actors) == 2 for actors in before.holders.values())
    gate = cluster.pool.hold_loads()
    cluster.pool.of("expert-1")[0].alive = False
    lost = await cluster.until(lambda p: "expert-1" not in p.generations)
    assert (lost.missing(), lost.fewest_copies()) == ([], 1)
    status = await cluster.controller.status()
    assert (status.missing_experts, status.min_copies, status.live_copies) == (0, 2, 1)
    gate.set()
    after = await cluster.complete()
    assert {k: set(v) for k, v in after.holders.items()} == {
        k: set(v) for k, v in before.holders.items()
    }


async def test_copies_sit_on_different_nodes_and_a_successor_on_its_predecessors() -> None:
    pool = FakePool("n1", "n1", "n2", "n2")
    cluster = await started(4, pool, min_copies=2)
    placement = cluster.state.placement
    node_of = {actor.actor_id: actor.node for actor in pool.actors}
    assert len(pool.actors) == 4
    for actors in placement.holders.values():
        assert {node_of[actor_id] for actor_id in actors} == {"n1", "n2"}
    pool.node_ids = ["n2"]
    pool.of("expert-0")[0].alive = False
    await cluster.comes("expert-0", 2)
    assert pool.of("expert-0")[1].node == "n1"


async def test_an_actor_that_does_not_tell_its_node_counts_as_one_on_a_node_of_its_own() -> None:
    pool = FakePool("n1", "n1")
    describe = pool.describe

    async def silent(actor: FakeActor, timeout_s: float, epoch: int = 0) -> ActorReport:
        if actor.actor_id == "expert-0":
            raise TimeoutError
        return await describe(actor, timeout_s, epoch)

    pool.describe = silent  # type: ignore[method-assign]
    cluster = await started(3, pool, min_copies=2)
    placement = cluster.state.placement
    assert len(pool.actors) == 3
    assert all("expert-0" in actors for actors in placement.holders.values())


async def test_copies_move_apart_when_a_node_joins_unless_actors_end_badly_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anti_affinity, "NODES_CHECK_S", 0.01)
    cluster = await started(2, min_copies=2)
    assert {actor.node for actor in cluster.pool.actors} == {"node"}

    async def nothing_moves() -> None:
        published, looks = len(cluster.published), cluster.pool.looks
        await happens(lambda: cluster.pool.looks >= looks + 3)
        assert len(cluster.published) == published

    monkeypatch.setattr(Deaths, "avoided_nodes", lambda deaths, now_s: {"bad": 1e9})
    cluster.pool.node_ids.append("bad")
    await nothing_moves()
    cluster.pool.node_ids.append("joined")
    await happens(lambda: len(cluster.pool.actors) == 3)
    await cluster.complete()
    living = {a.actor_id: (a.generation, a.node) for a in cluster.pool.actors if a.alive}
    assert living == {"expert-0": (2, "joined"), "expert-1": (1, "node")}
    # One copy of each expert was there all the time, and nothing moves any more.
    assert min(placement.fewest_copies() for placement in cluster.published[2:]) == 1
    cluster.pool.node_ids.append("third")
    await nothing_moves()


async def test_copies_move_apart_once_their_node_is_avoided_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anti_affinity, "NODES_CHECK_S", 0.01)
    monkeypatch.setattr(anti_affinity, "COPIES_CHECK_S", 0.1)
    avoided = {"bad": 1e9}
    monkeypatch.setattr(Deaths, "avoided_nodes", lambda deaths, now_s: avoided)
    cluster = await started(2, min_copies=2)
    cluster.pool.node_ids.append("bad")
    looks = cluster.pool.looks
    await happens(lambda: cluster.pool.looks >= looks + 30)
    assert len(cluster.pool.actors) == 2
    avoided.clear()
    await happens(lambda: len(cluster.pool.actors) == 3)
    await cluster.complete()
    assert {a.node for a in cluster.pool.actors if a.alive} == {"bad", "node"}


async def test_an_actor_that_moves_lives_until_every_router_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anti_affinity, "NODES_CHECK_S", 0.01)
    monkeypatch.setattr(members, "MEMBER_TTL_S", 1000)
    cluster = await started(2, min_copies=2)
    before = cluster.state.placement
    await cluster.controller.watch("router", 1, "n", before.order, 0)
    cluster.pool.node_ids.append("joined")
    left = await cluster.until(lambda placement: "expert-0" not in placement.generations)
    [actor] = cluster.pool.of("expert-0")
    asked_s = actor.asked_s
    await happens(lambda: actor.asked_s > asked_s)  # a heartbeat later
    assert actor.alive
    await cluster.controller.watch("router", 1, "n", left.order, 0)
    await cluster.comes("expert-0", 2)
    assert [a.node for a in cluster.pool.of("expert-0") if a.alive] == ["joined"]


async def test_a_silent_router_and_a_ledger_that_cannot_be_read_hold_a_move_up_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anti_affinity, "NODES_CHECK_S", 0.01)
    monkeypatch.setattr(anti_affinity, "KNOWN_TIMEOUT_S", 0.1)
    cluster = await started(2, min_copies=2)
    await cluster.controller.watch("router", 1, "n", cluster.state.placement.order, 0)
    cluster.pool.node_ids.append("joined")
    await cluster.until(lambda placement: "expert-0" not in placement.generations)
    with away(cluster.pool, "find"), away(cluster.pool.store, "keys") as asked:
        await happens(lambda: len(asked) > 0)
    await cluster.comes("expert-0", 2)
