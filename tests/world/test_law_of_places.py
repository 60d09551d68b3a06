"""What the law of places says of drained nodes, actors on standby, and successors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.world.fleets import with_fleet
from tests.world.weather import BEGIN_S, Event, Scenario, draw
from tests.world.world import World, run


@pytest.fixture
def world() -> Iterator[World]:
    """A deployment of six actors that serves, two on each of three nodes."""
    made = World(0)
    try:
        made.deploy("a")
        made.run(3.0)
        yield made
    finally:
        made.close()


def _happened(world: World, *kinds: str) -> None:
    world.happenings.hit = [Event(2.0, kind) for kind in kinds]


def _laws(world: World) -> list[str]:
    return [breach.law for breach in world.law.breaches]


def _node_with_actors(world: World) -> tuple[str, list[str]]:
    controller = world.controller()
    assert controller is not None
    found = {node: world.places.actors_on(controller, node) for node in world.cluster.nodes}
    return max(found.items(), key=lambda item: len(item[1]))


def test_drained_node_that_keeps_actors_breaks_the_law(world: World) -> None:
    node, actors = _node_with_actors(world)
    _happened(world, "node drains")
    world.places.emptied(node, len(actors))
    assert _laws(world) == ["drains succeed"]


def test_drained_node_may_keep_actors_where_others_have_no_memory(world: World) -> None:
    node, actors = _node_with_actors(world)
    _happened(world, "node drains", "memory full")
    world.places.emptied(node, len(actors))
    assert _laws(world) == []


def test_second_successor_breaks_the_law(world: World) -> None:
    controller = world.controller()
    assert controller is not None
    for _ in range(2):
        controller._state.fleet.add("expert")
    _happened(world, "node drains", "memory full")
    world.places.emptied("node-0", 2)
    assert _laws(world) == []
    world.places.emptied("node-0", 1)
    assert _laws(world) == ["who leaves has one successor"]


def test_standby_on_a_drained_node_may_not_be_taken(world: World) -> None:
    node, actors = _node_with_actors(world)
    world.places.taken(actors[0])
    assert _laws(world) == []
    world.cluster.nodes[node].is_draining = True
    world.places.taken(actors[0])
    assert _laws(world) == ["a drained node gets no successors"]


def _handle(world: World, node: str) -> Any:
    return SimpleNamespace(name="expertmesh:world:expert-0:g2", node=world.cluster.nodes[node])


def test_successor_elsewhere_breaks_the_law_while_its_node_has_room(world: World) -> None:
    _happened(world, "dies")
    world.places.placed(_handle(world, "node-1"), None)
    world.places.placed(_handle(world, "node-1"), "node-1")
    assert _laws(world) == []
    world.places.placed(_handle(world, "node-1"), "node-0")
    assert _laws(world) == ["a successor returns"]


@pytest.mark.parametrize("reason", ["moved", "more happened", "node is gone", "one copy"])
def test_successor_may_be_elsewhere_for_a_reason(world: World, reason: str) -> None:
    _happened(world, "dies", *(["links cut"] if reason == "more happened" else []))
    if reason == "moved":
        world.places.moved.add("expert-0")
    if reason == "node is gone":
        world.cluster.nodes["node-0"].is_alive = False
    if reason == "one copy":
        world.setting = replace(world.setting, min_copies=1)
    world.places.placed(_handle(world, "node-1"), "node-0")
    assert _laws(world) == []


@pytest.mark.parametrize(
    "kinds",
    [
        ["node drains"],
        ["memory full", "memory full", "node drains"],
        ["node added", "hangs"],
        ["node added", "dies", "node's device raises", "dies"],
    ],
    ids=" ".join,
)
def test_fleets_are_drawn_of_every_kind_and_break_no_law(kinds: list[str]) -> None:
    found = (with_fleet(Scenario(s, draw(0).setting, ()), Event, BEGIN_S) for s in range(2000))
    one = next(f for f in found if f is not None and [e.kind for e in f.events] == kinds)
    outcome = run(one)
    assert outcome.breaches == []
    assert [event.kind for event in outcome.hit] == kinds
    failed = [answer for answer in outcome.answers if answer.error]
    assert not failed or "memory full" in kinds  # then some actors are lost with their node
