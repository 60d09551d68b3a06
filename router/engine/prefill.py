"""Prefill: how the prompts that are under way share the tokens of a step. Pure functions.

Short prompts come first, so that a long one delays nobody's first token by much. The oldest one
always has a part, so that no prompt starves. A token's bits do not depend on the borders of chunks,
so the order changes no answer.
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
    ``length`` is the whole prompt.
    """

    left: int
    request_left: int
    length: int
    priority: int
    arrival: int


def divide(prompts: Sequence[Prompt], budget: int, ends_others: bool = False) -> list[int]:
    """Return how many tokens of each prompt a step computes, at most ``budget`` in all.

    The oldest prompt has a part of the budget (:data:`PARTS`), and at least one token. The prompts
    take the rest in the order of priority, then of the tokens that their requests have left, then
    of arrival; each takes as much as it can. In a step that ends prompts, the long ones
    (:data:`LONG_CHUNKS`) that it does not end have one part together, so that the first tokens do
    not wait for a full step. ``ends_others`` says that the step ends prompts that are not here.
    """
    shares = [0] * len(prompts)
    if budget <= 0 or not prompts:
        return shares
    part = max(1, budget // PARTS)
    oldest = min(range(len(prompts)), key=lambda i: prompts[i].arrival)
    shares[oldest] = min(part, prompts[oldest].left)
    ends_prompts = ends_others or shares[oldest] == prompts[oldest].left
    rest, long_rest = budget - shares[oldest], part - shares[oldest]
    if prompts[oldest].length <= LONG_CHUNKS * budget:
        long_rest = part
    for index in sorted(range(len(prompts)), key=lambda i: _turn(prompts[i])):
        prompt = prompts[index]
        more = min(prompt.left - shares[index], rest)
        ends = shares[index] + more == prompt.left
        if ends_prompts and not ends and prompt.length > LONG_CHUNKS * budget:
            more = min(more, long_rest)
            long_rest -= more
        shares[index] += more
        rest -= more
        ends_prompts = ends_prompts or ends
    return shares


def _turn(prompt: Prompt) -> tuple[int, int, int]:
    return prompt.priority, prompt.request_left, prompt.arrival
