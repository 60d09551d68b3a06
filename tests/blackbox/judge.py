"""Judges an answer by one process's tokens and by the faults that overlap it.

A failure is excused only by a fault of which the documents say that it touches this request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.blackbox.asks import BROKEN, MISTAKES, REFUSED, Answer, Choice, Failure, Kind

LATE_S = 10.0
"""How long after its deadline a request may end."""
SILENT = (REFUSED, BROKEN, "unavailable", "deadline_exceeded")
"""How a request fails whose gateway is gone, hangs, or is cut off from everything."""


@dataclass(slots=True)
class Fault:
    """A fault or a change, from before it began until the cluster was calm again.

    ``lost`` is the machine whose gateway may break, ``left`` the one whose gateway ends after its
    last request. ``replaces`` says that other weights are deployed. ``costs`` are the machines
    whose actors may fail: an expert has copies on two, so that one of them loses none.
    """

    what: str
    began_s: float
    ended_s: float = float("inf")
    lost: int = 0
    left: int = 0
    replaces: bool = False
    costs: int = 0

    def overlaps(self, began_s: float, ended_s: float) -> bool:
        """Return whether it was there in this time."""
        return self.began_s <= ended_s and began_s <= self.ended_s


class Judge:
    """``expected`` has one process's choices by the name of the weights. Not safe for threads."""

    def __init__(self, expected: Callable[[str, Answer], Sequence[Choice]]) -> None:
        self._expected = expected
        self._weights: dict[str, str] = {}
        """What each identity names: for ever the same weights."""

    def violations(self, answer: Answer, served: list[str], faults: list[Fault]) -> list[str]:
        """Return what is wrong; ``served`` are the weights that may have answered meanwhile."""
        found = [
            f"machine {failure.machine} fails: {failure.code} {failure.param}: {failure.message}"
            for failure in answer.failures
            if not _is_excused(answer, failure, faults)
        ]
        if answer.ended_s > answer.began_s + answer.ask.timeout_s + LATE_S:
            found.append(f"ended {answer.ended_s - answer.began_s:.1f} s after it began")
        if answer.ask.mistake:
            return found if answer.has_failed else [f"a wrong {answer.ask.mistake} is accepted"]
        num_tokens, prompt = answer.num_tokens, len(answer.ask.prompt)
        if not answer.has_failed and answer.usage != (prompt, num_tokens, prompt + num_tokens):
            found.append(f"usage is {answer.usage}: {prompt} of the prompt, {num_tokens} came")
        return [*found, *self._of_weights(answer, served), *_of_exactness(answer, faults)]

    def _of_weights(self, answer: Answer, served: list[str]) -> list[str]:
        """Compare with all weights that the answer may be of; all its choices are of one."""
        named = {choice.identity for choice in answer.choices} - {""}
        for identity in named:
            unnamed = [one for one in served if one not in self._weights.values()]
            if identity not in self._weights and len(unnamed) == 1:
                self._weights[identity] = unnamed[0]
        weights = {self._weights.get(identity) for identity in named} or set(served)
        if (len(weights) > 1 and named) or not weights <= set(served):
            return [f"is of {weights} ({named}), served are {served}"]
        by_weights = [
            [
                f"choice {number}: {wrong}"
                for number, choice in enumerate(answer.choices)
                for wrong in _differences(answer, choice, self._expected(str(one), answer)[number])
            ]
            for one in weights
        ]
        return min(by_weights, key=len)


def _is_excused(answer: Answer, failure: Failure, faults: Iterable[Fault]) -> bool:
    """Return whether the deadline, the request's own mistake or a fault explains a failure."""
    if answer.ask.kind is Kind.HASTY and failure.code == "deadline_exceeded":
        return True
    if mistake := answer.ask.mistake:
        is_named = failure.param.endswith(mistake) or mistake in failure.message
        if failure.code.endswith(MISTAKES[mistake][1]) and is_named:
            return True
    near = [fault for fault in faults if fault.overlaps(failure.began_s, failure.at_s)]
    if failure.code in SILENT and any(fault.lost == failure.machine for fault in near):
        return True
    if failure.code == REFUSED and any(fault.left == failure.machine for fault in near):
        return True
    is_other_model = failure.code == "invalid_argument" and failure.param.endswith(".identity")
    return is_other_model and any(fault.replaces for fault in faults)


def _differences(answer: Answer, choice: Choice, right: Choice) -> Iterator[str]:
    """Yield what is not as one process has it; after an inexact token all may be."""
    came, logprobs = choice.token_ids, choice.logprobs
    wanted = 0 if answer.ask.body["logprobs"] is None else len(came)
    if len(logprobs) != wanted:
        yield f"{len(logprobs)} log probabilities instead of {wanted}"
    exact = len(came) if choice.doubted else choice.num_exact
    if came[:exact] != right.token_ids[:exact]:
        yield f"the first {exact} tokens of {came} are not of {right.token_ids}"
    elif logprobs[:exact] != right.logprobs[: min(exact, wanted)]:
        yield f"log probabilities {logprobs} instead of {right.logprobs}"
    end = len(came), choice.finish_reason, choice.text
    right_end = len(right.token_ids), right.finish_reason, right.text
    if not answer.has_failed and exact == len(came) and end != right_end:
        yield f"ends by {end} instead of {right_end}"


def _of_exactness(answer: Answer, faults: Iterable[Fault]) -> Iterator[str]:
    """Yield what is wrong with ``exact``: said at the end, and false for a reason and for ever."""
    is_strict = answer.ask.body["on_expert_loss"] == "strict"
    may_lose = not is_strict and sum(fault.costs for fault in faults) >= 2
    for number, choice in enumerate(answer.choices):
        told = [exact for _, exact in choice.told]
        if choice.finish_reason is not None and not told:
            yield f"choice {number} does not say whether it is exact"
        if told != sorted(told, reverse=True):
            yield f"choice {number} is exact again after it was not"
        if not all(told) and not may_lose and not choice.doubted:
            yield f"choice {number} is not exact, and no expert was lost"
