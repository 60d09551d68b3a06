"""Routers are told the kernel classes of their experts, with the placement that has these."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.controller import controller as controller_module
from cluster.controller.records.kernels import ExpertKernels
from cluster.placement.placement import Placement, empty_placement
from cluster.spec import EMULATED, UNKNOWN, ActorReport, ExpertKey, ModelExperts, ModelKernel
from tests.unit.cluster.controller.fakes import Cluster, FakePool, happens, started

pytestmark = pytest.mark.usefixtures("short_periods")
TORCH = "torch-avx2"
LIMIT_S = 60.0


def told(actor_id: str, *classes: str, device: str = "cpu", generation: int = 1) -> ActorReport:
    kernels = tuple(ModelKernel("m", kernel_class) for kernel_class in classes)
    return ActorReport(
        actor_id=actor_id, generation=generation, digest="", epoch=1, pid=1, node="n",
        device=device, experts=(), weight_bytes=0, tokens={}, queued_rows=0, steps=0,
        kernels=kernels,
    )  # fmt: skip


def placed(**generations: int) -> Placement:
    placement = empty_placement(1, [ModelExperts("m", (0,), 4, 1), ModelExperts("n", (0,), 1, 1)])
    for actor_id, generation in generations.items():
        placement = placement.with_actor(actor_id, generation, [ExpertKey("m", 0, 0)])
    return placement


def test_a_models_classes_are_those_of_its_holders() -> None:
    kernels = ExpertKernels()
    for report in (told("a", "fused"), told("b", TORCH, "paired"), told("c", "unfused")):
        kernels.note(report)
    assert kernels.classes("m", placed(a=1)) == {"fused"}
    assert kernels.classes("m", placed(a=1, b=1)) == {"fused", "paired", TORCH}
    assert kernels.classes("n", placed(a=1)) == kernels.classes("m", placed()) == frozenset()
    kernels.note(told("a", TORCH))
    assert kernels.classes("m", placed(a=1)) == {TORCH}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (told("b", "fused"), {UNKNOWN}),
        (told("a"), {UNKNOWN}),
        (told("a", "fused", generation=2), {UNKNOWN}),
        (replace(told("a"), kernels=(ModelKernel("n", "fused"),)), {UNKNOWN}),
        (told("a", device=EMULATED), set()),
    ],
)
def test_an_actor_that_has_told_none_is_unknown_unless_it_is_emulated(
    report: ActorReport, expected: set[str]
) -> None:
    kernels = ExpertKernels()
    kernels.note(report)
    assert kernels.classes("m", placed(a=1)) == expected


async def answers(cluster: Cluster, model: str) -> AsyncIterator[tuple[set[str], set[str]]]:
    """Yield the holders of a model's experts and the classes that are told, as a router polls."""
    known, holders = (-1, -1), set[str]()
    while True:
        watch = cluster.controller.watch
        answer: dict[str, Any] = await watch("router", 77, "n", known, 1.0, None, model)
        placement: Placement | None = answer["placement"]
        if placement is not None:
            known = placement.order
            placed_keys = placement.held().items()
            holders = {a for a, keys in placed_keys if any(k.model == model for k in keys)}
        assert answer["epoch"] == known[0]
        yield holders, set(answer["expert_classes"])


async def test_a_new_actors_class_comes_with_its_first_experts() -> None:
    pool = FakePool()
    pool.kernel_classes["expert-2"] = TORCH
    cluster = await started(2, pool)
    growing = asyncio.create_task(cluster.controller.scale(3, "expert", False))
    async with asyncio.timeout(LIMIT_S):
        async for holders, classes in answers(cluster, "m"):
            assert classes == ({"fused", TORCH} if "expert-2" in holders else {"fused"})
            if growing.done():
                break
    assert "expert-2" in holders
    await growing


async def test_a_successor_knows_the_classes_before_its_own_experts_are_loaded() -> None:
    pool = FakePool()
    pool.kernel_classes |= {"expert-0": TORCH, "expert-1": TORCH}
    first = await started(2, pool, model="m@old")
    await first.stop()
    loads = pool.hold_loads()
    second = Cluster(2, pool, model="m@new")
    await second.start()
    async with asyncio.timeout(LIMIT_S):
        async for holders, classes in answers(second, "m@old"):
            assert holders == {"expert-0", "expert-1"}
            assert classes == {TORCH}
            if loads.is_set():
                break
            loads.set()


async def test_an_actor_that_is_silent_to_a_successor_is_unknown_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_module, "ADOPT_TIMEOUT_S", 0.05)
    pool = FakePool()
    first = await started(2, pool)
    own = first.state.placement
    await first.stop()
    [silent] = pool.of("expert-0")
    silent.hung = True
    second = Cluster(2, pool)
    await second.start()
    watch = second.controller.watch
    assert (await watch("router", 77, "n", own.order, 0, None, "m"))["asks_own"]
    answer = await watch("router", 77, "n", own.order, 0, None, "m", own=own)
    assert "expert-0" in answer["placement"].generations
    assert answer["expert_classes"] == {"fused", UNKNOWN}
    silent.hung = False
    kernels, state = second.controller._state.kernels, second.controller._state
    await happens(lambda: kernels.classes("m", state.placement) == {"fused"})
