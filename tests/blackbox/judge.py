"""Judges an answer: pure functions of the answer, of one process's tokens and of the faults.

A failure is excused by a fault only if the documents say that this fault touches this request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from tests.blackbox.answers import BROKEN, REFUSED, Answer, Choice, Failure
from tests.blackbox.asks import Kind
from tests.blackbox.oracle import Expected

LATE_S = 10.0
"""How long after its deadline a request may end."""
SILENT_CODES = (REFUSED, BROKEN, "unavailable", "deadline_exceeded")
"""How a request fails whose gateway is gone, hangs, or is cut off from everything."""


@dataclass(slots=True)
class Fault:
    """A fault or a change, from before it began until the cluster was calm again.

    ``lost`` are the machines whose gateways may break, ``left`` those whose gateways end after
    their last request, ``replaces`` whether other weights are deployed.
    """

    what: str
    began_s: float
    ended_s: float = float("inf")
    lost: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    replaces: bool = False
    costs: int = 0

    def overlaps(self, began_s: float, ended_s: float) -> bool:
        """Return whether it was there in this time."""
        return self.began_s <= ended_s and began_s <= self.ended_s


class Names:
    """What identities name. They are opaque: each names the same weights for ever. Not for threads.

    A new one names the only weights of those that may be served which have no name yet.
    """

    def __init__(self) -> None:
        self._weights: dict[str, str] = {}

    def weights(self, identity: str, served: Collection[str]) -> str | None:
        """Return the weights that an identity names, or ``None`` if it cannot be one of these."""
        unnamed = [one for one in served if one not in self._weights.values()]
        if identity not in self._weights and len(unnamed) == 1:
            self._weights[identity] = unnamed[0]
        found = self._weights.get(identity)
        return found if found in served else None


def judge(
    answer: Answer,
    expected: Callable[[str], Sequence[Expected]],
    served: Collection[str],
    names: Names,
    faults: Iterable[Fault],
) -> list[str]:
    """Return what is wrong with an answer; nothing where it is right.

    ``served`` are the weights that may have been served while it ran, and ``expected`` has one
    process's choices for each. ``faults`` are those that overlap it.
    """
    ask, found = answer.ask, []
    if ask.mistake is not None:
        return _judge_refusal(answer, list(faults))
    around = list(faults)
    for failure in answer.failures:
        if not _is_excused(answer, failure, around):
            found.append(f"failed at machine {failure.machine}: {failure.code}: {failure.message}")
    named = set().union(*(choice.identities for choice in answer.choices))
    if len(named) > 1:
        found.append(f"several identities in one answer: {sorted(named)}")
    weights = {name: names.weights(name, served) for name in named}
    if strange := [name for name, one in weights.items() if one is None]:
        found.append(f"an identity that was not deployed: {strange}")
    found += _judge_tokens(answer, expected, [*filter(None, weights.values())] or served)
    found += _judge_exact(answer, around)
    if answer.ended_s > answer.began_s + ask.timeout_s + LATE_S:
        found.append(f"ended {answer.ended_s - answer.began_s:.1f} s after it began")
    if not answer.has_failed:
        found += _judge_usage(answer)
    return found


def _judge_refusal(answer: Answer, faults: Sequence[Fault]) -> list[str]:
    mistake = answer.ask.mistake
    assert mistake is not None
    if not answer.has_failed:
        return [f"accepted with a wrong {mistake.field}"]
    [failure] = answer.failures
    is_named = failure.param.endswith(mistake.field) or mistake.field in failure.message
    if (failure.code in mistake.codes and is_named) or _is_excused(answer, failure, faults):
        return []
    return [f"a wrong {mistake.field} gets {failure.code} of {failure.param!r}: {failure.message}"]


def _is_excused(answer: Answer, failure: Failure, faults: Sequence[Fault]) -> bool:
    """Return whether the deadline or a fault explains a failure."""
    if answer.ask.kind is Kind.HASTY and failure.code == "deadline_exceeded":
        return True
    near = [fault for fault in faults if fault.overlaps(failure.began_s, failure.at_s)]
    if failure.code in SILENT_CODES and any(failure.machine in fault.lost for fault in near):
        return True
    if failure.code == REFUSED and any(failure.machine in fault.left for fault in near):
        return True
    # A stream that resumes after other weights were deployed.
    is_other_model = failure.code == "invalid_argument" and failure.param.endswith(".identity")
    return is_other_model and any(fault.replaces for fault in faults)


def _may_miss_experts(faults: Iterable[Fault]) -> bool:
    return sum(fault.costs for fault in faults) >= 2


def _judge_tokens(
    answer: Answer, expected: Callable[[str], Sequence[Expected]], served: Iterable[str]
) -> list[str]:
    """Compare with all weights that the answer may be of; all its choices are of one."""
    best: list[str] | None = None
    for weights in served:
        pairs = zip(answer.choices, expected(weights), strict=True)
        found = [
            f"choice {number}: {wrong}"
            for number, (choice, right) in enumerate(pairs)
            for wrong in _differences(choice, right, answer)
        ]
        if best is None or len(found) < len(best):
            best = found
    return ["nothing was deployed"] if best is None else best


def _differences(choice: Choice, right: Expected, answer: Answer) -> list[str]:
    came = choice.token_ids
    exact = sum(
        len(piece.token_ids)
        for piece in itertools.takewhile(lambda piece: piece.exact is not False, choice.pieces)
    )
    if answer.ask.kind is Kind.DOUBT:  # says inexact of tokens that are exact
        exact = len(came)
    if came[:exact] != right.token_ids[:exact]:
        first = next(i for i in range(exact) if came[i : i + 1] != right.token_ids[i : i + 1])
        return [f"token {first} of {len(came)} is wrong"]
    found = []
    logprobs = tuple(row for piece in choice.pieces for row in piece.logprobs)
    wanted = 0 if answer.ask.logprobs is None else len(came)
    if len(logprobs) != wanted:
        found.append(f"{len(logprobs)} log probabilities for {len(came)} tokens")
    if logprobs[:exact] != right.logprobs[: min(exact, wanted)]:
        found.append("the log probabilities are wrong")
    if not answer.has_failed and exact == len(came):
        found += _differences_at_end(choice, right)
    return found


def _differences_at_end(choice: Choice, right: Expected) -> list[str]:
    found = []
    if len(choice.token_ids) != len(right.token_ids):
        found.append(f"{len(choice.token_ids)} tokens instead of {len(right.token_ids)}")
    if choice.finish_reason != right.finish_reason:
        found.append(f"ends by {choice.finish_reason!r} instead of {right.finish_reason!r}")
    text = "".join(piece.text for piece in choice.pieces)
    if text != right.text:
        found.append(f"the text is {text!r} instead of {right.text!r}")
    return found


def _judge_exact(answer: Answer, faults: Sequence[Fault]) -> list[str]:
    """Exact is said at the end, never again once it is false, and false only for a reason."""
    ask, found = answer.ask, []
    for number, choice in enumerate(answer.choices):
        told = [piece.exact for piece in choice.pieces if piece.exact is not None]
        if choice.finish_reason is not None and not told:
            found.append(f"choice {number} does not say whether it is exact")
        if told != sorted(told, reverse=True):
            found.append(f"choice {number} is exact again after it was not")
        may_lose = ask.on_expert_loss != "strict" and _may_miss_experts(faults)
        if choice.is_inexact and not may_lose and choice.doubted is None:
            found.append(f"choice {number} is not exact, and no expert was lost")
        later = [] if choice.doubted is None else choice.pieces[choice.doubted :]
        if any(piece.exact for piece in later):
            found.append(f"choice {number} is exact though the client has said that it is not")
    return found


def _judge_usage(answer: Answer) -> list[str]:
    right = len(answer.ask.prompt), answer.num_tokens, len(answer.ask.prompt) + answer.num_tokens
    return [] if answer.usage == right else [f"usage is {answer.usage} instead of {right}"]
