"""The law can fail: each law is broken once, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.controller.records.ledger import Ledger
from router.gateway.limits.room import GRACE_S
from tests.world import law_of_queues
from tests.world.clients import Answer, Choice, Client, Plan
from tests.world.law import ALLOWED, LATE_S, UNTRUE_S, USED_S, WELL_S
from tests.world.law_of_ends import FIRST_LIVES
from tests.world.law_of_time import FIRST_S, look_at_times
from tests.world.model import tokens_of
from tests.world.ray_api import Handle
from tests.world.weather import Event
from tests.world.world import World

PROMPT, NUM = (3, 1, 4), 5
PLAN = Plan(4.0, 0, PROMPT, NUM, 10.0)


RIGHT = tokens_of("a", PROMPT, NUM)
LIVING_S = 3.0
"""A calm world runs after this."""


@pytest.fixture
def world() -> Iterator[World]:
    made = World(1)
    made.identities = {"a", "b"}
    yield made
    made.close()


@pytest.fixture
def living() -> Iterator[World]:
    made = World(1)
    made.deploy("a")
    made.run(LIVING_S + 10.0, lambda: made.kernel.now_s > LIVING_S and not made.unhealed())
    assert made.unhealed() == ""
    yield made
    made.close()


def answer(**changes: Any) -> Answer:
    """Return a right answer, with changes of it or of its choice."""
    of_choice = {name: changes.pop(name) for name in [*changes] if name in CHOICE}
    choice = Choice(
        **{"token_ids": [*RIGHT], "identity": "a", "finish_reason": "length"} | of_choice
    )
    return replace(Answer(PLAN, [choice], 4.0, 5.0), **changes)


CHOICE = {"token_ids", "identity", "is_exact", "forgot_exact", "finish_reason"}


def failure(error: str) -> Answer:
    return answer(error=error, choices=[Choice()])


def broken(world: World) -> list[str]:
    return [breach.law for breach in world.law.breaches]


def judged(world: World, *answers: Answer) -> list[str]:
    world.law.breaches.clear()
    world.law.answers([*answers], world.identities)
    return broken(world)


def test_right_answers_break_nothing(world: World) -> None:
    loose = answer(
        plan=replace(PLAN, on_expert_loss="drop"), choices=[Choice([1, 2], "a", False, "length")]
    )
    right = [
        answer(),
        answer(token_ids=[*tokens_of("b", PROMPT, NUM)], identity="b"),
        answer(choices=[Choice([*RIGHT[:2]], "a")], is_cancelled=True),
        loose,
        answer(ended_at_s=4.0 + PLAN.timeout_s + GRACE_S + LATE_S / 2),
        answer(choices=[Choice()], is_cancelled=True),
    ]
    assert judged(world, *right) == []


LATE = answer(ended_at_s=4.0 + PLAN.timeout_s + GRACE_S + 2 * LATE_S)


SERVED = "what can be served is served"


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("tokens are one model's", answer(token_ids=[7, *RIGHT[1:]])),
        ("tokens are one model's", answer(identity="b")),
        ("an answer names its model", answer(identity="z")),
        ("an answer names its model", answer(identity="")),
        ("strict is exact", answer(is_exact=False)),
        ("inexact stays inexact", answer(forgot_exact=True)),
        ("answers are whole", answer(token_ids=[*RIGHT[:-1]])),
        ("every request is answered", answer(ended_at_s=None)),
        ("answers come in time", LATE),
        ("errors are typed and true", answer(error="InternalError", message="a bug")),
        ("errors are typed and true", answer(error="untyped KeyError")),
        ("errors are typed and true", answer(error="the stream ended early")),
        *((SERVED, failure(error)) for error in sorted(ALLOWED)),
    ],
)
def test_a_wrong_answer_breaks_its_law(world: World, law: str, wrong: Answer) -> None:
    assert judged(world, answer(), wrong, answer()) == [law]


def test_a_deadline_is_excused_where_prompts_at_that_time_take_longer(world: World) -> None:
    failed = failure("DeadlineExceededError")
    other = answer(choices=[Choice()], is_cancelled=True)
    many, most = (replace(other, plan=replace(PLAN, prompt=(1,) * n)) for n in (100, 1200))
    assert judged(world, failed, many) == [SERVED]
    assert judged(world, failed, most) == []
    assert judged(world, failed, replace(most, begun_at_s=1.0, ended_at_s=2.0)) == [SERVED]


@pytest.mark.parametrize(
    ("error", "event", "least_copies", "is_excused"),
    [
        # The time of a slow device does not count for a deadline.
        ("DeadlineExceededError", Event(4.2, "device slow", for_s=9.5), 2, True),
        ("DeadlineExceededError", Event(4.2, "device slow", for_s=4.0), 2, False),
        ("DeadlineExceededError", Event(13.5, "device slow", for_s=9.5), 2, False),
        # What happens after an error excuses nothing.
        ("UnavailableError", Event(4.5, "links cut", for_s=1.0), 2, True),
        ("UnavailableError", Event(5.5, "links cut", for_s=1.0), 2, False),
        # Nor does a death where there are copies.
        ("UnavailableError", Event(4.5, "dies", role="actor"), 1, True),
        ("UnavailableError", Event(4.5, "dies", role="actor"), 2, False),
    ],
)
def test_an_error_is_excused_by_what_happened_before_it(
    world: World, error: str, event: Event, least_copies: int, is_excused: bool
) -> None:
    world.least_copies = least_copies
    world.happenings.hit = [event]
    assert judged(world, failure(error)) == ([] if is_excused else [SERVED])


# Records and kills.


@pytest.mark.parametrize(
    ("records", "laws"),
    [
        ([], []),
        ([(1, "x"), (1, "x"), (2, "y"), (5, "x")], []),
        ([(2, "x"), (1, "y")], ["epochs rise"]),
        ([(1, "x"), (1, "y")], ["one writer of the ledger"]),
        ([(1, "x"), (2, "y"), (1, "x")], ["epochs rise"]),
        ([(1, "x"), (2, "y"), (1, "z")], ["epochs rise", "one writer of the ledger"]),
    ],
)
def test_records_of_the_ledger(
    world: World, records: list[tuple[int, str]], laws: list[str]
) -> None:
    for number, (epoch, writer) in enumerate(records):
        write(world, number, epoch, writer)
    assert broken(world) == laws


def write(world: World, number: int, epoch: int, writer: str) -> None:
    """Put a record into the store, as the head does."""
    key = f"world/ledger/{number}"
    value = json.dumps({"ledger": Ledger(epoch).to_json(), "writer": writer}).encode()
    world.cluster.store[key] = value
    world.cluster.on_record(key, value)


def test_a_record_that_does_not_count_breaks_nothing(world: World) -> None:
    write(world, 5, 2, "x")
    write(world, 4, 1, "y")
    assert broken(world) == []
    write(world, 6, 1, "y")
    assert broken(world) == ["epochs rise"]


def used_actor(world: World) -> Handle:
    """Return an actor that has just computed for a router."""
    actor = world.happenings.actors()[0]
    world.used_at_s[actor.process.name] = world.kernel.now_s - USED_S / 2
    return actor


def cut(world: World, actor: Handle) -> None:
    """Cut the actor off from all others, the controller and the routers among them."""
    hosts = [host for host in world.network.addresses if host != actor.node.name]
    world.network.cut([(actor.node.name, host) for host in hosts])


def unheard(world: World, actor: Handle) -> None:
    world.cluster.cut_off.add(world.serve.deployments["controller"].running()[0].process.pid)
    world.cluster.lost = 0.1


REASONS: dict[str, Callable[[World, Handle], object] | None] = {
    "none": None,
    "not used": lambda world, actor: world.used_at_s.update(
        {actor.process.name: world.kernel.now_s - 2 * USED_S}
    ),
    "broken": lambda world, actor: world.break_device(actor.process.name, fault="raises"),
    "touched": lambda world, actor: world.touched_at_s.update(
        {actor.process.name: world.kernel.now_s - WELL_S / 2}
    ),
    "paused": lambda world, actor: world.kernel.pause(actor.process),
    "ended": lambda world, actor: world.kernel.end(actor.process),
    "deleted": lambda world, actor: setattr(world.serve, "is_wanted", False),
    "removed": lambda world, actor: world.controller()._state.fleet.specs.pop(
        actor.name.split(":")[2]
    ),
    "cut off": cut,
    "unheard": unheard,
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_kill_of_a_healthy_actor_that_is_used_breaks_the_law_without_a_reason(
    living: World, reason: str
) -> None:
    actor = used_actor(living)
    killer = living.serve.deployments["controller"].running()[0].process
    if why := REASONS[reason]:
        why(living, actor)
    living.law.killed(actor, killer)
    assert broken(living) == ([] if why else ["nobody healthy is killed"])


# Copies, queues, readiness.


def test_a_copy_that_goes_without_a_death_breaks_the_law(living: World) -> None:
    state = living.controller()._state
    before = state.placement
    key, (first, *others) = next(iter(before.holders.items()))
    after = replace(before, version=before.version + 1)
    living.law.published(before, after, state)
    dead = {actor: g for actor, g in before.generations.items() if actor != first}
    fewer = {**before.holders, key: tuple(others)}
    living.law.published(before, replace(after, holders=fewer, generations=dead), state)
    assert broken(living) == []
    living.law.published(before, replace(after, holders=fewer), state)
    assert broken(living) == ["copies are kept"]


@pytest.mark.parametrize("is_cut_off", [True, False])
def test_an_expert_that_an_earlier_controller_took_unheard_is_no_lost_copy(
    living: World, is_cut_off: bool
) -> None:
    state = living.controller()._state
    before = state.placement
    key, (first, *others) = next(iter(before.holders.items()))
    handle = living.cluster.actors[living.name_of(first, before.generations[first])]
    process = living.serve.deployments["controller"].running()[-1].process
    if is_cut_off:
        living.cluster.cut_off.add(process.pid)
    living.copies.called(handle, "unload", (before.epoch, [key]))
    holders = {**before.holders, key: tuple(others)}
    after = replace(before, epoch=before.epoch + 1, holders=holders)
    living.law.published(replace(before, epoch=before.epoch + 1), after, state)
    assert broken(living) == ([] if is_cut_off else ["copies are kept"])


def test_an_older_placement_breaks_the_law(living: World) -> None:
    state = living.controller()._state
    newer = replace(state.placement, version=state.placement.version + 1)
    living.law.published(newer, state.placement, state)
    assert broken(living) == ["epochs rise"]


@pytest.mark.parametrize(
    "bound", ["MAX_WAITING", "MAX_HELD", "MAX_BUFFERED_EVENTS", "MAX_KEYS", "PEERS_A_ROUTER"]
)
def test_a_queue_above_its_bound_breaks_the_law(
    living: World, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    living.law.look()
    assert broken(living) == []
    monkeypatch.setattr(law_of_queues, bound, -1)
    living.law.look()
    assert set(broken(living)) == {"queues are bounded"}


def test_rows_and_bytes_above_their_bounds_break_the_law(
    living: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    living.happenings.actors()[0].instance._actor._queue.max_rows = -1
    living.law.look()
    assert broken(living) == ["queues are bounded"]
    monkeypatch.setattr(law_of_queues, "MAX_BUFFERED_BYTES", -law_of_queues.MAX_FRAME_BYTES - 1)
    living.law.look()
    assert broken(living) == ["queues are bounded"] * (2 + living.setting.num_routers)


def test_an_actor_that_lives_too_often_breaks_the_law(world: World) -> None:
    world.happenings.hit.append(Event(4.0, "actor dies again and again", for_s=8.0))
    world.ends.looped("expert-1", FIRST_LIVES + 3)
    assert broken(world) == []
    world.ends.looped("expert-1", FIRST_LIVES + 4)
    assert broken(world) == ["a loop of deaths backs off"]


def test_a_gateway_that_stays_ready_without_an_expert_breaks_the_law(living: World) -> None:
    state = living.controller()._state
    key = next(iter(state.placement.holders))
    state.placement = replace(state.placement, holders={**state.placement.holders, key: ()})
    living.law.look()
    living.kernel.now_s += UNTRUE_S
    living.law.look()
    assert broken(living) == []
    living.kernel.now_s += 0.1
    living.law.look()
    assert broken(living) == ["readiness is true"] * living.setting.num_gateways


# The end.


def test_a_deployment_that_is_not_whole_is_not_healed(living: World) -> None:
    living.law.healed(0.0)
    assert broken(living) == []
    living.kernel.end(living.happenings.actors()[0].process)
    living.law.healed(0.0)
    assert broken(living) == ["healed in time"]


def test_nothing_is_left_of_a_calm_world(living: World) -> None:
    client = Client(living)
    client.send(replace(PLAN, at_s=living.kernel.now_s + 0.1))
    living.run(living.kernel.now_s + 3.0)
    living.law.answers(client.answers, living.identities)
    living.law.nothing_left()
    assert (broken(living), len(client.answers)) == ([], 1)


def keep_an_actor(world: World) -> None:
    actor = world.happenings.actors()[0]
    other = Handle(world.cluster, actor.name + "9", world.kernel.process("x", "node-0"), actor.node)
    world.cluster.actors[other.name] = other


def of_role(world: World, role: str) -> Any:
    return world.serve.deployments[role].running()[0].handle.instance


def leave_an_actor(world: World) -> None:
    task = world.kernel.create_future()
    task.set_result(None)
    world.controller()._keeper._tasks["expert-1"] = task


def raise_unseen(world: World) -> None:
    with world.kernel.within(world.operator):
        world.kernel.spawn(lambda: 1 / 0)
    world.run(world.kernel.now_s + 0.1)


LEFT: dict[str, tuple[str, Callable[[World], object]]] = {
    "a request": (
        "nothing is left",
        lambda world: of_role(world, "router")._requests.update(r=object()),
    ),
    "an inbox": (
        "nothing is left",
        lambda world: of_role(world, "gateway").upstream._inboxes.update(r=object()),
    ),
    "an actor": ("nothing is left", keep_an_actor),
    "an actor that nobody keeps": ("every actor is kept", leave_an_actor),
    "an error": ("nothing raises unseen", raise_unseen),
}


@pytest.mark.parametrize("left", LEFT)
def test_something_that_is_left_breaks_the_law(living: World, left: str) -> None:
    law, leave = LEFT[left]
    leave(living)
    living.law.nothing_left()
    assert broken(living) == [law]


def test_many_late_first_tokens_break_the_law_and_a_few_do_not(world: World) -> None:
    def answers(late: int) -> list[Answer]:
        waits_s = [FIRST_S + 1.0] * late + [FIRST_S - 1.0] * (20 - late)
        return [answer(first_at_s=4.0 + waited_s) for waited_s in waits_s]

    look_at_times(world, answers(6))
    assert broken(world) == []
    look_at_times(world, answers(7))
    assert broken(world) == ["nobody waits for another"]
    world.happenings.hit.append(Event(4.0, "dies", role="actor"))
    look_at_times(world, answers(20))
    assert broken(world) == ["nobody waits for another"]
