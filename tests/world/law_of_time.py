"""The law of waiting, for worlds in which hardly anything happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.world.clients import Answer
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.weather import Event
    from tests.world.world import World

QUIET = {
    "long prompts", "flood of a name", "gateway unreachable", "poison raises", "clock jumps",
    "node added",
}  # fmt: skip
"""Events that make no other request wait."""
SHORT_PROMPT = 8
FIRST_S, LATE_SHARE = 3.0, 0.3
"""How long the first token of a short prompt may take, and how many of them may take longer.

Cache that is kept for a long prompt, once many have passed it, makes a few wait for the end of
another long one, and a burst at that time.
"""
PATIENT_S = 10.0
"""Who has so much time outlasts the loss of an actor with the only copies of experts."""
STEP_TOKENS, STEP_S = 16, 0.16
"""The tokens of a router's step, and what it takes where an actor computes three experts of each
layer."""


def is_too_short(answer: Answer, answers: list[Answer], events: list[Event]) -> bool:
    """Return whether a request had less time than its router may need for all at that time.

    The time of a slow device does not count: a router learns that a copy is slow by its answers.
    """
    until_s = answer.begun_at_s + answer.plan.timeout_s
    slow_s = [
        min(event.at_s + event.for_s, until_s) - max(event.at_s, answer.begun_at_s)
        for event in events
        if event.kind == "device slow"
    ]
    prompts = [
        len(other.plan.prompt) * other.plan.n
        for other in answers
        if other.begun_at_s < until_s and (other.ended_at_s or until_s) > answer.begun_at_s
    ]
    steps = sum(prompts) / STEP_TOKENS + answer.plan.max_tokens
    return steps * STEP_S > answer.plan.timeout_s - sum(max(time_s, 0.0) for time_s in slow_s)


def is_poison(answer: Answer) -> bool:
    """Return whether a request is one at which something ends."""
    return any(token >= VOCAB for token in answer.plan.prompt)


def look_at_times(world: World, answers: list[Answer]) -> None:
    """Look at first tokens where nothing excuses a wait, and at patient requests.

    The short pieces of a step of a world with TLS make it slow.
    """
    hit = world.happenings.hit
    if all(event.kind in QUIET for event in hit) and not world.setting.tls:
        _first(world, answers)
    if len(hit) == 1 and hit[0].kind in ("dies", "crashes soon") and hit[0].role == "actor":
        for answer in answers:
            _patient(world, answer)


def _first(world: World, answers: list[Answer]) -> None:
    waited_s = [
        answer.first_at_s - answer.begun_at_s
        for answer in answers
        if answer.first_at_s is not None
        and len(answer.plan.prompt) <= SHORT_PROMPT
        and not is_poison(answer)
        and not answer.error
    ]
    late_s = [waited for waited in waited_s if waited > FIRST_S]
    if len(late_s) > LATE_SHARE * len(waited_s):
        number = f"{len(late_s)} of {len(waited_s)}"
        world.law.broken(
            "nobody waits for another", f"{number} first tokens took {min(late_s):.2f} s or more"
        )


def _patient(world: World, answer: Answer) -> None:
    plan = answer.plan
    if answer.error and plan.timeout_s >= PATIENT_S and not world.keys.judges(answer):
        world.law.broken(
            "who has time is served", f"{answer.error} at {plan.at_s:.3f}: {answer.message[:200]}"
        )
