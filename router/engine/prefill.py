"""Prefill: how the prompts that are under way share the tokens of a step. Pure functions.

Short prompts come first, so that a long one delays nobody's first token by much. The oldest one has
a part, of every second step at least, so that no prompt starves. A token's bits do not depend on
the borders of chunks, so the order changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PARTS = 4
"""Whatever else waits, the oldest prompt has one of so many parts of a step's budget."""
LONG_CHUNKS = 8
"""A prompt of more tokens than so many budgets is long."""


class Prompt(NamedTuple):
    """A prompt under way, in tokens but for ``priority`` and ``arrival``; lower ones come first.

    ``left`` are not computed yet, and ``request_left`` the same of all choices of its request.
    ``length`` is the whole prompt. ``cost`` is that of its next token, in tokens that attend to no
    others.
    """

    left: int
    request_left: int
    length: int
    priority: int
    arrival: int
    cost: float = 1.0


def divide(
    prompts: Sequence[Prompt], budget: int, ends_others: bool = False, leaves_out: bool = False
) -> list[int]:
    """Return how many tokens of each prompt a step computes, at most ``budget`` in all.

    The oldest prompt has a part of the budget (:data:`PARTS`) by its cost, and at least one token.
    The prompts take the rest in the order of priority, then of the tokens that their requests have
    left, then of arrival; each takes as much as it can. In a step that ends prompts, the long ones
    (:data:`LONG_CHUNKS`) that it does not end have one part together, or nothing with
    ``leaves_out``, so that the first tokens do not wait for a full step. ``ends_others`` says that
    the step ends prompts that are not here.
    """
    if leaves_out:
        is_long = [_is_long(prompt, budget) for prompt in prompts]
        short = [prompt for prompt, long in zip(prompts, is_long, strict=True) if not long]
        shares = _divide(short, budget, ends_others)
        if ends_others or any(s == p.left for p, s in zip(short, shares, strict=True)):
            rest_of_shares = iter(shares)
            return [0 if long else next(rest_of_shares) for long in is_long]
    return _divide(prompts, budget, ends_others)


def _divide(prompts: Sequence[Prompt], budget: int, ends_others: bool) -> list[int]:
    shares = [0] * len(prompts)
    if budget <= 0 or not prompts:
        return shares
    part = max(1, budget // PARTS)
    oldest = min(range(len(prompts)), key=lambda i: prompts[i].arrival)
    shares[oldest] = min(max(1, int(part / prompts[oldest].cost)), prompts[oldest].left)
    ends_prompts = ends_others or shares[oldest] == prompts[oldest].left
    rest, long_rest = budget - shares[oldest], float(part)
    if _is_long(prompts[oldest], budget):
        long_rest -= shares[oldest] * prompts[oldest].cost
    for index in sorted(range(len(prompts)), key=lambda i: _turn(prompts[i])):
        prompt = prompts[index]
        more = min(prompt.left - shares[index], rest)
        ends = shares[index] + more == prompt.left
        if ends_prompts and not ends and _is_long(prompt, budget):
            more = min(more, max(0, int(long_rest / prompt.cost)))
            long_rest -= more * prompt.cost
        shares[index] += more
        rest -= more
        ends_prompts = ends_prompts or ends
    return shares


def _is_long(prompt: Prompt, budget: int) -> bool:
    return prompt.length > LONG_CHUNKS * budget


def _turn(prompt: Prompt) -> tuple[int, int, int]:
    return prompt.priority, prompt.request_left, prompt.arrival
