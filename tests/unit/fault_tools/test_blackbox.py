"""The black-box checker sees each kind of wrong answer, and excuses only what a fault explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.blackbox import asks, events
from tests.blackbox.asks import BROKEN, REFUSED, Answer, Choice, Failure, Kind
from tests.blackbox.judge import Fault, Judge

RIGHT = {
    "own": [Choice((5, 6, 7), (-1.0, -2.0, -3.0), "abc", finish_reason="length")],
    "swapped": [Choice((5, 8, 9), (-1.0, -4.0, -5.0), "ade", finish_reason="stop")],
}
ASK = next(
    replace(ask, body={**ask.body, "on_expert_loss": "drop", "n": 1, "logprobs": 0})
    for ask in (asks.draw(7, number) for number in range(100))
    if ask.kind is Kind.STREAM
)
PROMPT = len(ASK.prompt)


def answer_of(name: str = "own", identity: str = "i", kind: Kind = Kind.STREAM) -> Answer:
    """Return the right answer, in three pieces."""
    [right] = RIGHT[name]
    choice = Choice(identity=identity)
    for number, token_id in enumerate(right.token_ids):
        end = right.finish_reason if number == 2 else None
        choice.add([token_id], [right.logprobs[number]], right.text[number], True, end)
    usage = PROMPT, 3, PROMPT + 3
    return Answer(replace(ASK, kind=kind), 10.0, [choice], ended_s=12.0, usage=usage)


def violations(answer: Answer, *faults: Fault, served: Sequence[str] = ("own",)) -> list[str]:
    """Return what a judge says that has seen no other answer."""
    return Judge(lambda name, _: RIGHT[name]).violations(answer, [*served], [*faults])


def broken(code: str, machine: int = 2, param: str = "", kind: Kind = Kind.STREAM) -> Answer:
    """Return an answer that ended before its last token."""
    answer = answer_of(kind=kind)
    [choice] = answer.choices
    choice.token_ids, choice.logprobs, choice.text = (5, 6), (-1.0, -2.0), "ab"
    choice.finish_reason, answer.has_failed, answer.usage = None, True, ()
    answer.failures.append(Failure(machine, 10.0, 11.0, code, param, "why"))
    return answer


def test_right_answers_are_right() -> None:
    assert violations(answer_of()) == []
    assert violations(answer_of("swapped"), served=("swapped",)) == []
    assert violations(answer_of("swapped", identity=""), served=("own", "swapped")) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choice: setattr(choice, "token_ids", (5, 8, 7)),
        lambda choice: setattr(choice, "token_ids", (5, 6)),
        lambda choice: setattr(choice, "token_ids", (5, 6, 6, 7)),
        lambda choice: setattr(choice, "logprobs", (-1.0, -2.0, -3.0000001)),
        lambda choice: setattr(choice, "logprobs", ()),
        lambda choice: setattr(choice, "finish_reason", "stop"),
        lambda choice: setattr(choice, "text", "abd"),
        lambda choice: setattr(choice, "told", []),
        lambda choice: setattr(choice, "told", [(0, True), (2, False)]),
        lambda choice: setattr(choice, "told", [(0, False), (2, True)]),
        lambda choice: choice.told.insert(1, (1, False)),
    ],
)
def test_each_wrong_part_of_an_answer_is_seen(spoil: Callable[[Choice], Any]) -> None:
    answer = answer_of()
    spoil(answer.choices[0])
    assert len(violations(answer)) >= 1


def test_usage_and_deadlines_are_judged() -> None:
    answer = answer_of()
    answer.usage = PROMPT, 4, PROMPT + 4
    assert len(violations(answer)) == 1
    answer = answer_of()
    answer.ended_s = 10.0 + ASK.timeout_s + 11.0
    assert len(violations(answer)) == 1


def test_an_identity_names_one_set_of_weights_for_ever() -> None:
    judge = Judge(lambda name, _: RIGHT[name])
    both = ["own", "swapped"]
    assert judge.violations(answer_of(), ["own"], []) == []
    assert judge.violations(answer_of("swapped", "j"), both, []) == []
    assert judge.violations(answer_of("swapped", "i"), both, []) != []  # the other one's tokens
    assert judge.violations(answer_of("own", "i"), ["swapped"], []) != []  # served no more
    assert judge.violations(answer_of("own", "k"), both, []) != []  # never deployed
    mixed = answer_of()
    mixed.choices.append(answer_of("swapped", "j").choices[0])
    assert judge.violations(mixed, both, []) != []


def test_exact_may_end_only_if_both_copies_may_be_lost() -> None:
    answer = answer_of()
    [choice] = answer.choices
    choice.token_ids, choice.told = (5, 6, 9), [(0, True), (2, False)]
    one, two = Fault("kill", 9.0, costs=1), Fault("cut", 9.0, costs=2)
    assert violations(answer, two) == []
    assert violations(answer, one) != []
    answer.ask = replace(ASK, body={**ASK.body, "on_expert_loss": "strict"})
    assert violations(answer, two) != []


@pytest.mark.parametrize(
    ("answer", "fault", "is_excused"),
    [
        (broken(BROKEN), Fault("kill gateways", 9.0, lost=2), True),
        (broken(BROKEN), Fault("kill gateways", 9.0, lost=3), False),
        (broken(BROKEN), Fault("kill gateways", 11.5, lost=2), False),
        (broken("internal"), Fault("kill gateways", 9.0, lost=2), False),
        (broken("unavailable"), Fault("kill routers", 9.0), False),
        (broken(BROKEN), Fault("drain", 9.0, left=2), False),
        (broken(REFUSED), Fault("drain", 9.0, left=2), True),
        (broken("deadline_exceeded"), Fault("scale", 9.0), False),
        (broken("deadline_exceeded", kind=Kind.HASTY), Fault("scale", 9.0), True),
        (broken("invalid_argument", 2, "resume[0].identity"), Fault("scale", 9.0), False),
        (broken("invalid_argument", 2, "resume[0].identity"), Fault("", 9.0, replaces=True), True),
    ],
)
def test_a_failure_is_excused_by_a_fault_that_touches_it(
    answer: Answer, fault: Fault, is_excused: bool
) -> None:
    assert (violations(answer, fault) == []) == is_excused
    if answer.ask.kind is not Kind.HASTY:
        assert len(violations(answer)) == 1


def test_an_invalid_request_must_get_its_own_error() -> None:
    answer = broken("invalid_argument", param="sampling.temperature", kind=Kind.WRONG)
    answer.ask = replace(answer.ask, mistake="temperature")
    assert violations(answer) == []
    answer.has_failed = False
    assert violations(answer) == ["a wrong temperature is accepted"]
    answer = broken("internal", param="sampling.temperature", kind=Kind.WRONG)
    answer.ask = replace(answer.ask, mistake="temperature")
    assert len(violations(answer)) == 1


def test_a_seed_draws_the_same_history_and_all_kinds() -> None:
    bags: tuple[list[str], list[str]] = ([], [])
    one, other = ([events.draw(3, number, bag) for number in range(40)] for bag in bags)
    assert one == other
    assert {event.kind for episode in one for event in episode} == set(events.KINDS)
    drawn = [asks.draw(3, number) for number in range(200)]
    assert drawn == [asks.draw(3, number) for number in range(200)]
    assert {ask.kind for ask in drawn} == set(Kind)
    assert {ask.mistake for ask in drawn} == {"", *asks.MISTAKES}
