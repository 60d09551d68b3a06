"""An excuse names the request and the events that touched it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.world.clients import Answer, Choice, Plan
from tests.world.excuses import BROKEN_TEXTS, RECOVERY_S, SETTLED_S
from tests.world.model import POISONS
from tests.world.weather import Event
from tests.world.world import World

PLAN = Plan(4.0, 0, (1, 2), 4, 6.0)
CUT = Event(4.5, "links cut", for_s=1.0)


@pytest.fixture
def world() -> Iterator[World]:
    """A deployment that serves, at four seconds."""
    made = World(0)
    try:
        made.deploy("a")
        made.run(4.0)
        yield made
    finally:
        made.close()


def _happened(world: World, *events: Event, target: str = "") -> None:
    world.happenings.hit = [*events]
    world.happenings.targets = [target] * len(events)


def _failed(begun_at_s: float, plan: Plan = PLAN, error: str = "UnavailableError") -> Answer:
    return Answer(plan, [Choice()], begun_at_s, begun_at_s + 1.0, error)


def test_an_excuse_names_the_request_and_the_event_in_the_trace(world: World) -> None:
    _happened(world, CUT)
    world.law.answers([_failed(4.0)], {"a"})
    assert [breach.law for breach in world.law.breaches] == []
    [told] = [line for line in world.trace if "excused" in line]
    assert "UnavailableError at 4.000" in told
    assert CUT.line() in told


@pytest.mark.parametrize(
    ("whole_later_s", "begun_later_s", "is_excused"),
    [
        (0.5, 0.5 + SETTLED_S / 2, True),
        (0.5, 0.5 + 2 * SETTLED_S, False),
        (None, 0.5 + 2 * SETTLED_S, True),
        (None, RECOVERY_S + 0.1, False),
    ],
)
def test_an_event_that_was_overcome_excuses_no_later_request(
    world: World, whole_later_s: float | None, begun_later_s: float, is_excused: bool
) -> None:
    _happened(world, CUT)
    over_s = CUT.at_s + CUT.for_s
    if whole_later_s is not None:
        world.run(over_s + whole_later_s)
        world.excuses.look()
    assert world.excuses.of(_failed(over_s + begun_later_s)) == (CUT.line() if is_excused else "")


def test_nothing_is_overcome_while_it_lasts_or_the_deployment_is_not_whole(world: World) -> None:
    actor = world.happenings.actors()[0].process
    poison = Event(4.0, "poison ends actors")
    _happened(world, CUT, Event(4.0, "crashes soon"), target=actor.name)
    world.answers = [replace(_failed(4.0), ended_at_s=None)]
    world.answers[0].plan = replace(PLAN, prompt=(POISONS[poison.kind],))
    world.run(8.0)
    world.break_device(actor.name, fault="nan")
    for number, end in enumerate([lambda: world.mend_device(actor.name), lambda: None]):
        world.excuses.look()
        assert len(world.excuses._whole_at_s) == number  # the crash is still to come
        end()
    _happened(world, poison)
    world.excuses = type(world.excuses)(world)
    world.excuses.look()
    assert world.excuses._whole_at_s == {}
    world.answers[0].ended_at_s = 8.0
    world.end(actor)
    world.excuses.look()
    assert world.excuses._whole_at_s == {}  # one actor is dead
    world.run(12.0)
    world.excuses.look()
    assert world.excuses._whole_at_s == {0: 12.0}


def test_two_losses_of_copies_together_excuse_what_one_does_not(world: World) -> None:
    deaths = [Event(4.1, "dies", role="actor"), Event(4.2, "dies", 1, role="actor")]
    _happened(world, deaths[0])
    assert world.excuses.of(_failed(4.0)) == ""
    _happened(world, *deaths)
    assert world.excuses.of(_failed(4.0)) == "; ".join(event.line() for event in deaths)
    _happened(world, Event(4.1, "burst"))
    assert world.excuses.of(_failed(4.0)) == ""
    world.least_copies = 1
    assert world.excuses.of(_failed(4.0)) == "burst 0"


def test_a_request_may_be_its_own_excuse(world: World) -> None:
    poisoned = replace(PLAN, prompt=(POISONS["poison raises"],))
    assert "poisoned" in world.excuses.of(_failed(4.0, poisoned))
    short = replace(PLAN, timeout_s=0.5)
    assert "time" in world.excuses.of(_failed(4.0, short, "DeadlineExceededError"))
    assert world.excuses.of(_failed(4.0, short)) == ""


@pytest.mark.parametrize("text", BROKEN_TEXTS)
def test_an_internal_error_needs_a_broken_device_and_no_other_copy(world: World, text: str) -> None:
    answer = replace(_failed(4.0), message=f"e0: the {text} here")
    assert not world.excuses.may_be_internal(answer)
    _happened(world, Event(4.0, "device raises"))
    assert not world.excuses.may_be_internal(answer)
    world.least_copies = 1
    assert world.excuses.may_be_internal(answer)
    assert not world.excuses.may_be_internal(replace(answer, message="a bug"))
