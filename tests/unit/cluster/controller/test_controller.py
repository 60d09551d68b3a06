"""The controller over a fake pool: what it answers routers and gateways, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.controller import controller as controller_module
from cluster.controller.lifecycle import keeper as keeper_module
from cluster.controller.records import members
from cluster.reports import KeyUse, ProcessSamples, ProcessStatus, Samples
from tests.unit.cluster.controller.fakes import (
    LIMIT_S,
    NUM_EXPERTS,
    Cluster,
    happens,
    started,
    tasks_of,
)

pytestmark = pytest.mark.usefixtures("short_periods")


async def test_a_watch_returns_at_once_when_something_else_is_known() -> None:
    cluster = await started()
    placement = cluster.state.placement
    for known in ((-1, -1), (0, 5), (placement.epoch, placement.version + 7), (9, 9)):
        told = await asyncio.wait_for(
            cluster.controller.watch("router", 1, "n", known, 3600), LIMIT_S
        )
        assert told["placement"] == placement


async def test_a_watch_returns_no_placement_when_nothing_changes_in_its_time_or_the_controllers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = await started()
    order = cluster.state.placement.order
    # What comes over Ray may be a list.
    known: Any = list(order)
    for one in (order, known):
        told = await cluster.controller.watch("router", 1, "n", one, 0.01)
        assert told["placement"] is None
    monkeypatch.setattr(controller_module, "MAX_WATCH_S", 0.01)
    watch = cluster.controller.watch("router", 1, "n", order, 3600)
    assert (await asyncio.wait_for(watch, LIMIT_S))["placement"] is None


async def test_the_status_tells_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MEMBER_TTL_S", 1000)
    monkeypatch.setattr(keeper_module, "HEARTBEAT_PERIOD_S", 3600)
    cluster = await started()
    placement = cluster.state.placement
    [first] = cluster.pool.of("expert-0")
    first.tokens = dict.fromkeys(first.keys, 3)
    await cluster.controller.suspect("expert-0", 1)
    await happens(lambda: first.heartbeats == 2)
    await cluster.controller.watch("router", 11, "n1", placement.order, 0)
    await cluster.controller.watch("router", 11, "n1", placement.order, 0)
    await cluster.controller.watch("router", 12, "n1", placement.order, 0)
    await cluster.controller.watch("gateway", 1, "n2", placement.order, 0)
    status = await cluster.controller.status()
    assert status.models == ("m",)
    assert (status.epoch, status.placement_version) == placement.order
    assert status.missing_experts == 0
    assert (status.min_copies, status.live_copies) == (1, 1)
    assert [(p.pid, p.node) for p in status.routers] == [(11, "n1"), (12, "n1")]
    assert [p.pid for p in status.gateways] == [1]
    assert [a.actor_id for a in status.actors] == ["expert-0", "expert-1"]
    actor = status.actors[0]
    assert (actor.pid, actor.generation, actor.device) == (first.pid, 1, "cpu")
    assert actor.experts == tuple(tuple(key) for key in first.keys)
    assert actor.tokens == 3 * len(first.keys)
    assert actor.weight_bytes == 10 * len(first.keys)


async def test_measurements_have_the_newest_samples_of_all_and_the_actors_reports() -> None:
    cluster = await started()
    order = cluster.state.placement.order
    late, early = Samples(2.0, {"late": []}), Samples(1.0, {"early": []})
    await cluster.controller.watch("router", 11, "n1", order, 0, late)
    await cluster.controller.watch("router", 11, "n1", order, 0, early)  # was overtaken
    await cluster.controller.watch("router", 12, "n1", order, 0)
    own = ProcessSamples("gateway", ProcessStatus(1, "n2"), early)
    told = await cluster.controller.measurements(own)
    assert told.status == await cluster.controller.status()
    assert [report.actor_id for report in told.reports] == ["expert-0", "expert-1"]
    router = ProcessSamples("router", ProcessStatus(11, "n1"), late)
    assert told.processes == (router, own)


async def test_each_gateway_gets_what_the_others_have_used_of_quotas() -> None:
    cluster = await started()
    order = cluster.state.placement.order

    async def watch(kind: str, pid: int, taken_s: float, **used: int) -> dict[str, Any]:
        uses = {name: KeyUse(1, tokens, 0, 0.5, 9.0) for name, tokens in used.items()}
        samples = Samples(taken_s, {}, uses=uses)
        answer = await cluster.controller.watch(kind, pid, "n", order, 0, samples)
        return {gateway: dict(uses) for gateway, uses in answer["uses"].items()}

    assert await watch("gateway", 1, 1.0, alice=5) == {}
    first = {"gateway:n:1": {"alice": KeyUse(1, 5, 0, 0.5, 9.0)}}
    assert await watch("gateway", 2, 1.0, alice=2, bob=7) == first
    assert await watch("router", 3, 1.0) == {}
    assert await watch("gateway", 2, 2.0) == first
    assert await watch("gateway", 1, 2.0, alice=6) == {"gateway:n:2": {}}
    assert (await watch("gateway", 2, 3.0))["gateway:n:1"]["alice"].tokens == 6


async def test_the_status_of_a_cluster_without_actors_has_those_who_were_heard_lately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    await cluster.controller.watch("router", 11, "n1", (-1, -1), 0)
    status = await cluster.controller.status()
    assert status.missing_experts == 2 * NUM_EXPERTS
    assert (status.actors, len(status.routers), status.gateways) == ((), 1, ())
    monkeypatch.setattr(members, "MEMBER_TTL_S", 0)
    assert (await cluster.controller.status()).routers == ()


async def test_a_deletion_is_told_to_all_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "APP_CHECK_S", 0.001)
    answers: list[bool | Exception] = [True, ConnectionError("Serve is away"), False]

    def app_is_wanted(app: str) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(controller_module, "app_is_wanted", app_is_wanted)
    cluster = await started()
    order = cluster.state.placement.order
    watch = asyncio.create_task(
        cluster.controller.watch("router", 1, "n", order, controller_module.MAX_WATCH_S)
    )
    await asyncio.sleep(0)
    assert not (await cluster.controller.watch("gateway", 1, "n", order, 0))["is_deleted"]
    await cluster.controller.look_for_deletion()
    assert (await watch)["is_deleted"]
    assert (await cluster.controller.watch("gateway", 1, "n", order, 60))["is_deleted"]
    assert not any(actor.killed for actor in cluster.pool.actors)


@pytest.mark.parametrize("wanted", [True, False])
async def test_closing_ends_the_actors_only_when_the_application_is_deleted(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setattr(controller_module, "app_is_wanted", lambda app: wanted)
    cluster = await started()
    await cluster.controller.close()
    assert [actor.killed for actor in cluster.pool.actors] == [not wanted] * 2
    await asyncio.wait(tasks_of(cluster.controller), timeout=LIMIT_S)
    assert len(cluster.pool.actors) == 2  # and nobody brings them back
