"""What the law of what comes late says of waiting actors, forgiven nodes, and copies."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.world.late import with_late
from tests.world.law_of_late import (
    ASKED_AGAIN_S,
    FORGIVEN_S,
    LONGEST_S,
    MIN_PRODUCTS,
    NEW_S,
    NODE_FORGIVEN_S,
    SOON_S,
)
from tests.world.loads import with_load
from tests.world.weather import BEGIN_S, FIRST_LONG, LONG_S, Event, Scenario, Setting, draw
from tests.world.world import World, run

NAME = "expertmesh:world:expert-0:g2"
MARGIN_S = 0.1


@pytest.fixture
def world() -> Iterator[World]:
    """Three nodes without a deployment, at a late time."""
    made = World(0, Setting(min_copies=1))
    try:
        made.kernel.now_s = 200.0
        yield made
    finally:
        made.close()


def _laws(world: World) -> list[str]:
    return [breach.law for breach in world.law.breaches]


def _happened(world: World, *kinds: str) -> None:
    world.happenings.hit = [Event(100.0, kind) for kind in kinds]


def _ended(world: World, *ago_s: float) -> None:
    """Note ends of one actor, so many seconds ago each."""
    for each_s in ago_s:
        world.late._ended_at_s["expert-0"].append(world.kernel.now_s - each_s)
        world.late._waiting.add("expert-0")


def _place(world: World, node: str) -> None:
    handle: Any = SimpleNamespace(name=NAME, node=world.cluster.nodes[node])
    handle.node.actors.append(SimpleNamespace(process=SimpleNamespace(is_alive=True)))
    world.late.placed(handle, "node-0")


@pytest.mark.parametrize(
    ("waited_s", "kind", "laws"),
    [
        (LONGEST_S - MARGIN_S, "dies", []),
        (LONGEST_S + MARGIN_S, "dies", ["a successor comes in time"]),
        (LONGEST_S + MARGIN_S, "node lost", []),
    ],
)
def test_actor_without_a_successor_for_long_breaks_the_law(
    world: World, waited_s: float, kind: str, laws: list[str]
) -> None:
    _happened(world, kind)
    _ended(world, waited_s)
    for _ in range(2):
        world.late.look()
    assert _laws(world) == laws


@pytest.mark.parametrize(
    ("worked_s", "waited_s", "laws"),
    [
        (FORGIVEN_S + MARGIN_S, SOON_S + MARGIN_S, ["deaths are forgiven"]),
        (FORGIVEN_S + MARGIN_S, SOON_S - MARGIN_S, []),
        (FORGIVEN_S - MARGIN_S, SOON_S + MARGIN_S, []),
    ],
)
def test_successor_that_is_late_after_long_work_breaks_the_law(
    world: World, worked_s: float, waited_s: float, laws: list[str]
) -> None:
    _happened(world, "dies")
    _ended(world, waited_s + worked_s, waited_s)
    _place(world, "node-0")
    assert _laws(world) == laws


@pytest.mark.parametrize(
    ("node", "ago_s", "laws"),
    [
        ("node-0", NODE_FORGIVEN_S + MARGIN_S, []),
        ("node-1", NODE_FORGIVEN_S - MARGIN_S, []),
        ("node-1", NODE_FORGIVEN_S + MARGIN_S, ["a node is used again"]),
    ],
)
def test_empty_node_that_is_left_out_for_long_breaks_the_law(
    world: World, node: str, ago_s: float, laws: list[str]
) -> None:
    _happened(world, "node's device raises", "dies")
    _ended(world, ago_s, 0.0)
    busy: Any = SimpleNamespace(process=SimpleNamespace(is_alive=True))
    for other in ("node-1", "node-2"):
        world.cluster.nodes[other].actors.append(busy)
    _place(world, node)
    assert _laws(world) == laws


@pytest.mark.parametrize(
    ("kind", "from_s"), [("slow once", ASKED_AGAIN_S), ("dies", NEW_S[0])], ids=["slow", "new"]
)
def test_copy_that_is_not_asked_breaks_the_law(world: World, kind: str, from_s: float) -> None:
    world.setting = Setting()
    processes: list[Any] = [SimpleNamespace(name=f"{NAME}{i}", is_alive=True) for i in range(2)]
    for process in processes:
        made: Any = SimpleNamespace(name=process.name, process=process)
        world.cluster.actors[process.name] = made
    _happened(world, kind)
    world.kernel.now_s = 100.0 + from_s  # not yet
    for _ in range(MIN_PRODUCTS):
        world.late.computed(processes[0])
    world.late.calmed()
    assert _laws(world) == []
    world.kernel.now_s += MARGIN_S
    for number in range(2 * MIN_PRODUCTS):
        world.late.computed(processes[number % 2])
    world.late.calmed()
    assert _laws(world) == []
    for _ in range(3 * MIN_PRODUCTS):
        world.late.computed(processes[0])
    world.late.calmed()
    assert _laws(world) == ["who is well is asked"]


@pytest.mark.parametrize(
    ("kind", "has_choices"), [("router full", True), ("dies", False)], ids=["full", "new copy"]
)
def test_load_breaks_no_law(kind: str, has_choices: bool) -> None:
    found = (with_load(Scenario(s, draw(0).setting, ()), Event, BEGIN_S) for s in range(2000))
    one = next(f for f in found if f is not None and f.events[0].kind == kind)
    outcome = run(one)
    assert outcome.breaches == []
    assert [event.kind for event in outcome.hit] == [kind]
    assert {len(answer.choices) > 1 for answer in outcome.answers} == {has_choices}
    assert not any(answer.error for answer in outcome.answers)


@pytest.mark.parametrize(
    "kinds",
    [
        ["actor dies again and again"],
        ["actor dies again and again", "dies"],
        ["node's device raises", "dies"],
        ["slow once"],
    ],
    ids=" ".join,
)
def test_late_weather_is_drawn_of_every_kind_and_breaks_no_law(kinds: list[str]) -> None:
    scenario = Scenario(0, draw(FIRST_LONG).setting, ())
    assert scenario.setting.calm_s >= LONG_S
    seeds = (Scenario(seed, scenario.setting, ()) for seed in range(2000))
    found = (with_late(seed, Event, BEGIN_S) for seed in seeds)
    outcome = run(next(f for f in found if f is not None and [e.kind for e in f.events] == kinds))
    assert outcome.breaches == []
    assert [event.kind for event in outcome.hit] == kinds
    assert not any(answer.error for answer in outcome.answers)
