"""Prefill: how the prompts in flight share the tokens of a step. Pure functions.

Among prompts of equal priority each tenant gets an even share of the step, and leaves what it does
not need to the others. Within a share short prompts come first, so that a long one delays nobody's
first token by much. The oldest prompt gets a part of at least every second step, so that no prompt
starves. A token's bits do not depend on chunk borders, so the order changes no answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

PARTS = 4
"""The oldest prompt always gets 1/``PARTS`` of a step's budget."""
LONG_CHUNKS = 8
"""A prompt is long if it has more tokens than this many budgets."""


class Prompt(NamedTuple):
    """A prompt in flight, in tokens except ``priority`` and ``arrival``; lower ones come first.

    ``left`` tokens are not computed yet; ``request_left`` counts them over all choices of its
    request. ``length`` is the whole prompt. ``cost`` is its next token's cost, relative to a token
    that attends to no others.
    """

    left: int
    request_left: int
    length: int
    priority: int
    arrival: int
    cost: float = 1.0


def tenant_budgets(of_tenant: Mapping[str, Sequence[Prompt]], budget: int) -> dict[str, int]:
    """Return each tenant's part of a step's ``budget``, at most what its prompts have left.

    Prompts of a lower priority get what the others leave. Tokens of one priority are divided by
    max-min fairness, which is deficit round robin when each token can be served on its own.
    """
    budgets = dict.fromkeys(of_tenant, 0)
    left: dict[int, Counter[str]] = {}
    for tenant, prompts in of_tenant.items():
        for prompt in prompts:
            left.setdefault(prompt.priority, Counter())[tenant] += prompt.left
    for _, wanted in sorted(left.items()):
        for served, (tenant, tokens) in enumerate(sorted(wanted.items(), key=itemgetter(1))):
            part = min(tokens, -(-budget // (len(wanted) - served)))
            budgets[tenant] += part
            budget -= part
    return budgets


def divide(
    prompts: Sequence[Prompt],
    budget: int,
    ends_others: bool = False,
    leaves_out: bool = False,
    step_tokens: int | None = None,
) -> list[int]:
    """Return how many tokens of each prompt a step computes, at most ``budget`` in all.

    The oldest prompt gets a part of the budget (:data:`PARTS`) by its cost, and at least one token.
    The prompts take the rest in order of priority, then of the tokens left in their requests, then
    of arrival; each takes as much as it can. In a step that ends prompts, the long ones
    (:data:`LONG_CHUNKS`) that it does not end share one part, or get nothing with ``leaves_out``,
    so that the first tokens do not wait for a full step. A long prompt that is more urgent than all
    short ones is not held back. ``ends_others`` says that the step also ends prompts not passed
    here. If ``budget`` is only part of a step's, ``step_tokens`` is the whole; it decides which
    prompts are long.
    """
    gives_way = _deferred_prompts(prompts, step_tokens or budget)
    if leaves_out:
        others = [p for p, waits in zip(prompts, gives_way, strict=True) if not waits]
        shares = _divide(others, [False] * len(others), budget, ends_others)
        if ends_others or any(s == p.left for p, s in zip(others, shares, strict=True)):
            shares_left = iter(shares)
            return [0 if waits else next(shares_left) for waits in gives_way]
    return _divide(prompts, gives_way, budget, ends_others)


def _deferred_prompts(prompts: Sequence[Prompt], budget: int) -> list[bool]:
    """Return which prompts are long, and not more urgent than all short ones."""
    is_long = [prompt.length > LONG_CHUNKS * budget for prompt in prompts]
    urgent = min(
        (p.priority for p, long in zip(prompts, is_long, strict=True) if not long),
        default=-math.inf,
    )
    return [long and p.priority >= urgent for p, long in zip(prompts, is_long, strict=True)]


def _divide(
    prompts: Sequence[Prompt], gives_way: Sequence[bool], budget: int, ends_prompts: bool
) -> list[int]:
    shares = [0] * len(prompts)
    if budget <= 0 or not prompts:
        return shares
    part = max(1, budget // PARTS)
    oldest = min(range(len(prompts)), key=lambda i: prompts[i].arrival)
    shares[oldest] = min(max(1, int(part / prompts[oldest].cost)), prompts[oldest].left)
    ends_prompts = ends_prompts or shares[oldest] == prompts[oldest].left
    rest, long_rest = budget - shares[oldest], float(part)
    if gives_way[oldest]:
        long_rest -= shares[oldest] * prompts[oldest].cost
    for index in sorted(range(len(prompts)), key=lambda i: _turn(prompts[i])):
        prompt = prompts[index]
        more = min(prompt.left - shares[index], rest)
        ends = shares[index] + more == prompt.left
        if ends_prompts and not ends and gives_way[index]:
            more = min(more, max(0, int(long_rest / prompt.cost)))
            long_rest -= more * prompt.cost
        shares[index] += more
        rest -= more
        ends_prompts = ends_prompts or ends
    return shares


def _turn(prompt: Prompt) -> tuple[int, int, int]:
    return prompt.priority, prompt.request_left, prompt.arrival
