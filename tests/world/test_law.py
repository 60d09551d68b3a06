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
from tests.world.kernel import Process
from tests.world.law import ALLOWED, LATE_S, UNTRUE_S, USED_S, WELL_S
from tests.world.law_of_ends import MAX_LIVES
from tests.world.law_of_time import FIRST_S, look_at_times
from tests.world.model import tokens_of
from tests.world.ray_api import Handle
from tests.world.weather import Event
from tests.world.world import Device, World

PROMPT, NUM = (3, 1, 4), 5
PLAN = Plan(4.0, 0, PROMPT, NUM, 10.0)
LIVING_S = 3.0
"""A calm world runs after this."""


@pytest.fixture
def world() -> Iterator[World]:
    """Yield a world in which nothing has happened yet."""
    made = World(1)
    made.identities = {"a", "b"}
    yield made
    made.close()


@pytest.fixture
def living() -> Iterator[World]:
    """Yield a world that runs."""
    made = World(1)
    made.deploy("a")
    made.run(LIVING_S + 10.0, lambda: made.kernel.now_s > LIVING_S and not made.unhealed())
    assert made.unhealed() == ""
    yield made
    made.close()


def answer(**changes: Any) -> Answer:
    """Return a right answer, with changes."""
    tokens = list(tokens_of("a", PROMPT, NUM))
    right = Answer(PLAN, [Choice(tokens, "a", True, "length")], 4.0, 5.0)
    return replace(right, **changes)


def choice(**changes: Any) -> Answer:
    """Return an answer whose choice has changes."""
    right = answer()
    return replace(right, choices=[replace(right.choices[0], **changes)])


def broken(world: World) -> list[str]:
    """Return the laws that were broken."""
    return [breach.law for breach in world.law.breaches]


def test_right_answers_break_nothing(world: World) -> None:
    of_b = list(tokens_of("b", PROMPT, NUM))
    cancelled = answer(choices=[Choice(list(tokens_of("a", PROMPT, 2)), "a")], is_cancelled=True)
    loose = answer(
        plan=replace(PLAN, on_expert_loss="drop"), choices=[Choice([1, 2], "a", False, "length")]
    )
    late = answer(ended_at_s=4.0 + PLAN.timeout_s + GRACE_S + LATE_S / 2)
    never = answer(choices=[Choice()], is_cancelled=True)
    right = [answer(), choice(token_ids=of_b, identity="b"), cancelled, loose, late, never]
    world.law.answers(right, world.identities)
    assert broken(world) == []


WRONG = [7, *tokens_of("a", PROMPT, NUM)[1:]]
LATE = answer(ended_at_s=4.0 + PLAN.timeout_s + GRACE_S + 2 * LATE_S)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("tokens are one model's", choice(token_ids=WRONG)),
        ("tokens are one model's", choice(identity="b")),
        ("an answer names its model", choice(identity="z")),
        ("an answer names its model", choice(identity="")),
        ("strict is exact", choice(is_exact=False)),
        ("answers are whole", choice(token_ids=list(tokens_of("a", PROMPT, NUM - 1)))),
        ("every request is answered", answer(ended_at_s=None)),
        ("answers come in time", LATE),
        ("errors are typed and true", answer(error="InternalError", message="a bug")),
        ("errors are typed and true", answer(error="untyped KeyError")),
        ("errors are typed and true", answer(error="the stream ended early")),
        *(
            ("what can be served is served", answer(error=error, choices=[Choice()]))
            for error in sorted(ALLOWED)
        ),
    ],
)
def test_a_wrong_answer_breaks_its_law(world: World, law: str, wrong: Answer) -> None:
    world.law.answers([answer(), wrong, answer()], world.identities)
    assert broken(world) == [law]


def test_a_deadline_is_excused_where_prompts_at_that_time_take_longer(world: World) -> None:
    failed = answer(error="DeadlineExceededError", choices=[Choice()])
    other = answer(choices=[Choice()], is_cancelled=True)
    many, most = (replace(other, plan=replace(PLAN, prompt=(1,) * n)) for n in (100, 1200))
    world.law.answers([failed, many], world.identities)
    assert broken(world) == ["what can be served is served"]
    world.law.answers([failed, most], world.identities)
    assert len(broken(world)) == 1
    world.law.answers([failed, replace(most, begun_at_s=1.0, ended_at_s=2.0)], world.identities)
    assert len(broken(world)) == 2


def test_the_time_of_a_slow_device_does_not_count_for_a_deadline(world: World) -> None:
    failed = answer(error="DeadlineExceededError", choices=[Choice()])
    world.least_copies = 2
    for at_s, for_s, is_excused in ((4.2, 9.5, True), (4.2, 4.0, False), (13.5, 9.5, False)):
        world.law.breaches.clear()
        world.happenings.hit = [Event(at_s, "device slow", for_s=for_s)]
        world.law.answers([failed], world.identities)
        assert broken(world) == ([] if is_excused else ["what can be served is served"])


def test_an_error_is_excused_by_what_happened_before_it_alone(world: World) -> None:
    failed = answer(error="UnavailableError", choices=[Choice()])
    world.happenings.hit = [Event(4.5, "links cut", for_s=1.0)]
    world.law.answers([failed], world.identities)
    assert broken(world) == []
    world.happenings.hit = [Event(5.5, "links cut", for_s=1.0)]
    world.law.answers([failed], world.identities)
    assert broken(world) == ["what can be served is served"]


def test_a_gentle_event_excuses_nothing_where_there_are_copies(world: World) -> None:
    failed = answer(error="UnavailableError", choices=[Choice()])
    world.happenings.hit = [Event(4.5, "dies", role="actor")]
    world.least_copies = 1
    world.law.answers([failed], world.identities)
    assert broken(world) == []
    world.least_copies = 2
    world.law.answers([failed], world.identities)
    assert broken(world) == ["what can be served is served"]


# Records and kills.


def record(epoch: int, writer: str) -> bytes:
    """Return a record of the ledger as controllers write it."""
    return json.dumps({"ledger": Ledger(epoch).to_json(), "writer": writer}).encode()


@pytest.mark.parametrize(
    ("records", "laws"),
    [
        ([], []),
        ([(1, "x")], []),
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
        write(world, number, record(epoch, writer))
    assert broken(world) == laws


def write(world: World, number: int, value: bytes) -> None:
    """Put a record into the store, as the head does."""
    key = f"world/ledger/{number}"
    world.cluster.store[key] = value
    world.cluster.on_record(key, value)


def test_a_record_that_does_not_count_breaks_nothing(world: World) -> None:
    write(world, 5, record(2, "x"))
    write(world, 4, record(1, "y"))
    assert broken(world) == []
    write(world, 6, record(1, "y"))
    assert broken(world) == ["epochs rise"]


def used_actor(world: World) -> Handle:
    """Return an actor that has just computed for a router."""
    actor = world.happenings.actors()[0]
    world.used_at_s[actor.process.name] = world.kernel.now_s - USED_S / 2
    return actor


def killer_of(world: World) -> Process:
    """Return the controller's process."""
    return world.serve.deployments["controller"].running()[0].process


def test_a_kill_of_a_healthy_actor_that_is_used_breaks_the_law(living: World) -> None:
    living.law.killed(used_actor(living), killer_of(living))
    assert broken(living) == ["nobody healthy is killed"]


def spare(world: World, actor: Handle) -> None:
    world.used_at_s[actor.process.name] = world.kernel.now_s - 2 * USED_S


def break_device(world: World, actor: Handle) -> None:
    world._devices[actor.process.name] = Device(fault="raises")


def touch(world: World, actor: Handle) -> None:
    world.touched_at_s[actor.process.name] = world.kernel.now_s - WELL_S / 2


def pause(world: World, actor: Handle) -> None:
    world.kernel.pause(actor.process)


def end(world: World, actor: Handle) -> None:
    world.kernel.end(actor.process)


def delete(world: World, actor: Handle) -> None:
    world.serve.is_wanted = False


def remove(world: World, actor: Handle) -> None:
    world.controller()._state.fleet.specs.pop(actor.name.split(":")[2])


def cut(world: World, actor: Handle) -> None:
    """Cut the actor off from all others, the controller and the routers among them."""
    hosts = [host for host in world.network.addresses if host != actor.node.name]
    world.network.cut([(actor.node.name, host) for host in hosts])


@pytest.mark.parametrize("why", [spare, break_device, touch, pause, end, delete, remove, cut])
def test_a_kill_with_a_reason_breaks_nothing(
    living: World, why: Callable[[World, Handle], None]
) -> None:
    actor, killer = used_actor(living), killer_of(living)
    why(living, actor)
    living.law.killed(actor, killer)
    assert broken(living) == []


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


BOUNDS = ("MAX_WAITING", "MAX_HELD", "MAX_BUFFERED_EVENTS", "MAX_KEYS", "PEERS_A_ROUTER")


@pytest.mark.parametrize("bound", BOUNDS)
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
    world.happenings.hit.append(Event(4.0, "actor dies again and again"))
    world.ends.looped("expert-1", MAX_LIVES)
    assert broken(world) == []
    world.ends.looped("expert-1", MAX_LIVES + 1)
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


def keep_a_request(world: World) -> None:
    router = world.serve.deployments["router"].running()[0].handle.instance
    router._requests["r"] = object()


def keep_an_inbox(world: World) -> None:
    gateway = world.serve.deployments["gateway"].running()[0].handle.instance
    gateway.upstream._inboxes["r"] = object()


def keep_an_actor(world: World) -> None:
    actor = world.happenings.actors()[0]
    other = Handle(world.cluster, actor.name + "9", world.kernel.process("x", "node-0"), actor.node)
    world.cluster.actors[other.name] = other


@pytest.mark.parametrize("keep", [keep_a_request, keep_an_inbox, keep_an_actor])
def test_something_that_is_left_breaks_the_law(
    living: World, keep: Callable[[World], None]
) -> None:
    keep(living)
    living.law.nothing_left()
    assert broken(living) == ["nothing is left"]


def test_an_actor_that_nobody_keeps_breaks_the_law(living: World) -> None:
    task = living.kernel.create_future()
    task.set_result(None)
    living.controller()._keeper._tasks["expert-1"] = task
    living.law.nothing_left()
    assert broken(living) == ["every actor is kept"]


def test_an_error_that_nobody_caught_breaks_the_law(living: World) -> None:
    with living.kernel.within(living.operator):
        living.kernel.spawn(lambda: 1 / 0)
    living.run(living.kernel.now_s + 0.1)
    living.law.nothing_left()
    assert broken(living) == ["nothing raises unseen"]


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
