"""The law of waiting, for worlds in which hardly anything happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.world.clients import Answer
from tests.world.model import VOCAB

if TYPE_CHECKING:
    from tests.world.world import World

QUIET = {"long prompts", "gateway unreachable", "poison raises", "clock jumps", "node added"}
"""Events that make no other request wait."""
SHORT_PROMPT = 8
FIRST_S = 5.0
"""How long the first token of a short prompt may take."""
PATIENT_S = 10.0
"""Who has so much time outlasts the loss of an actor with the only copies of experts."""


def is_poison(answer: Answer) -> bool:
    """Return whether a request is one at which something ends."""
    return any(token >= VOCAB for token in answer.plan.prompt)


def look_at_times(world: World, answers: list[Answer]) -> None:
    """Look at first tokens where nothing excuses a wait, and at patient requests.

    The short pieces of a step of a world with TLS make it slow.
    """
    hit = world.happenings.hit
    if all(event.kind in QUIET for event in hit) and not world.setting.tls:
        for answer in answers:
            _first(world, answer)
    if len(hit) == 1 and hit[0].kind in ("dies", "crashes soon") and hit[0].role == "actor":
        for answer in answers:
            _patient(world, answer)


def _first(world: World, answer: Answer) -> None:
    if len(answer.plan.prompt) > SHORT_PROMPT or is_poison(answer) or answer.error:
        return
    if answer.first_at_s is None:
        return
    waited_s = answer.first_at_s - answer.begun_at_s
    if waited_s > FIRST_S:
        world.law.broken(
            "nobody waits for another", f"{waited_s:.2f} s for a token at {answer.begun_at_s:.3f}"
        )


def _patient(world: World, answer: Answer) -> None:
    plan = answer.plan
    if answer.error and plan.timeout_s >= PATIENT_S:
        world.law.broken(
            "who has time is served", f"{answer.error} at {plan.at_s:.3f}: {answer.message[:200]}"
        )
