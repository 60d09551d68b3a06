"""How prompts share a step's tokens: short ones first, and no prompt starves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.scheduling.prefill import LONG_CHUNKS, PARTS, Prompt, divide, tenant_budgets


def prompt(
    left: int,
    arrival: int,
    *,
    length: int | None = None,
    request_left: int | None = None,
    priority: int = 0,
    cost: float = 1.0,
) -> Prompt:
    """A prompt, by default of its own request and not begun."""
    return Prompt(left, request_left or left, length or left, priority, arrival, cost)


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [
        ([], []),
        ([prompt(500, 0)], [100]),
        ([prompt(5, 0)], [5]),
        ([prompt(60, 0), prompt(60, 1), prompt(60, 2)], [60, 40, 0]),  # alike: as they came
        ([prompt(300, 0), prompt(60, 1)], [40, 60]),  # the short one first, the oldest a part
        ([prompt(300, 0), prompt(90, 1)], [25, 75]),
        ([prompt(90, 0), prompt(300, 1), prompt(20, 2)], [80, 0, 20]),
        ([prompt(9000, 0), prompt(10, 1)], [25, 10]),  # a long one has its part alone
        ([prompt(10, 0), prompt(9000, 1)], [10, 25]),
        ([prompt(9000, 0), prompt(9000, 1), prompt(10, 2)], [25, 0, 10]),  # one part for all
        ([prompt(9000, 0), prompt(9000, 1)], [100, 0]),  # nobody's first token waits
        ([prompt(30, 0, length=9000), prompt(10, 1)], [30, 10]),  # it ends itself
    ],
)
def test_shares_of_a_step_of_a_hundred_tokens(prompts: list[Prompt], shares: list[int]) -> None:
    assert divide(prompts, 100) == shares


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [
        ([prompt(9000, 0, cost=5.0), prompt(10, 1)], [5, 10]),  # as if they were 25
        ([prompt(9000, 0, cost=99.0), prompt(10, 1)], [1, 10]),  # it always goes on
        ([prompt(9000, 0, cost=20.0), prompt(9000, 1, cost=3.0), prompt(10, 2)], [1, 1, 10]),
        ([prompt(9000, 0, cost=5.0)], [100]),  # nobody waits
        ([prompt(300, 0, cost=5.0), prompt(60, 1)], [40, 60]),  # nor is it long
    ],
)
def test_a_part_is_less_where_a_token_attends_to_many(
    prompts: list[Prompt], shares: list[int]
) -> None:
    assert divide(prompts, 100) == shares


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [
        ([prompt(9000, 0), prompt(10, 1)], [0, 10]),
        ([prompt(9000, 0), prompt(70, 1), prompt(70, 2)], [0, 70, 30]),
        ([prompt(9000, 0)], [100]),  # nobody waits
        ([prompt(9000, 0), prompt(300, 1)], [25, 75]),  # nor does the step end it
        ([prompt(30, 0, length=9000), prompt(10, 1)], [0, 10]),
        ([prompt(9000, 1, priority=-1), prompt(10, 0)], [90, 10]),  # it is more urgent
        ([prompt(9000, 0), prompt(9000, 1, priority=-1), prompt(10, 2)], [25, 75, 0]),
    ],
)
def test_a_long_prompt_may_be_left_out_of_a_step_that_ends_others(
    prompts: list[Prompt], shares: list[int]
) -> None:
    assert divide(prompts, 100, leaves_out=True) == shares


@pytest.mark.parametrize(
    ("prompts", "options", "shares"),
    [
        # A step that ends a prompt by itself holds long ones back too, or leaves them out.
        ([prompt(9000, 0)], {"ends_others": True}, [25]),
        ([prompt(700, 0)], {"ends_others": True}, [100]),
        ([prompt(9000, 0)], {"ends_others": True, "leaves_out": True}, [0]),
        # Long is told by the whole step.
        ([prompt(700, 0), prompt(10, 1)], {"budget": 20, "step_tokens": 100}, [10, 10]),
        ([prompt(700, 0), prompt(10, 1)], {"budget": 20}, [5, 10]),
        # A request of several choices counts as all of them.
        (
            [
                prompt(400, 0),
                *(prompt(30, 1 + i, request_left=120) for i in range(4)),
                prompt(50, 5),
            ],
            {},
            [25, 25, 0, 0, 0, 50],
        ),
        # Priority comes before length.
        ([prompt(400, 0), prompt(10, 1), prompt(500, 2, priority=-1)], {}, [25, 0, 75]),
    ],
)
def test_shares_under_other_conditions(
    prompts: list[Prompt], options: dict[str, Any], shares: list[int]
) -> None:
    assert divide(prompts, **{"budget": 100, **options}) == shares


PROMPTS = st.lists(
    st.builds(
        prompt,
        st.integers(1, 60),
        st.integers(0, 99),
        length=st.integers(60, 400),
        request_left=st.integers(60, 90),
        priority=st.integers(-1, 1),
    ),
    min_size=1,
    max_size=9,
    unique_by=lambda p: p.arrival,
)


def slowly(prompts: list[Prompt], budget: int) -> list[int]:
    """``divide``, one token at a time: who gets the next one, if anyone."""
    shares = [0] * len(prompts)
    part = max(1, budget // PARTS)
    oldest = min(prompts, key=lambda p: p.arrival)

    def is_long(i: int) -> bool:
        return prompts[i].length > LONG_CHUNKS * budget

    for _ in range(budget):
        due = [i for i, p in enumerate(prompts) if shares[i] < p.left]
        if not due:
            break
        i = prompts.index(oldest)
        if not (i in due and shares[i] < part):
            i = min(
                due, key=lambda i: (prompts[i].priority, prompts[i].request_left, prompts[i][4])
            )
        shares[i] += 1
    return shares


@settings(max_examples=60)
@given(PROMPTS, st.integers(1, 200))
def test_without_long_prompts_a_step_is_divided_token_by_token(
    prompts: list[Prompt], budget: int
) -> None:
    short = [p._replace(length=p.left) for p in prompts if p.left <= LONG_CHUNKS * budget]
    if short:
        assert divide(short, budget) == slowly(short, budget)


@settings(max_examples=60)
@given(PROMPTS, st.integers(1, 200), st.booleans())
def test_a_step_is_filled_but_for_long_prompts_beside_those_that_end(
    prompts: list[Prompt], budget: int, ends_others: bool
) -> None:
    shares = divide(prompts, budget, ends_others)
    part = max(1, budget // PARTS)
    assert all(0 <= share <= p.left for p, share in zip(prompts, shares, strict=True))
    oldest = min(range(len(prompts)), key=lambda i: prompts[i].arrival)
    assert shares[oldest] >= min(part, prompts[oldest].left)
    ends = [share == p.left for p, share in zip(prompts, shares, strict=True)]
    held = [
        share
        for p, share, end in zip(prompts, shares, ends, strict=True)
        if p.length > LONG_CHUNKS * budget and not end
    ]
    wanted = min(budget, sum(p.left for p in prompts))
    assert sum(shares) <= wanted
    if not held or not (any(ends) or ends_others):
        assert sum(shares) == wanted


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 300), st.integers(-2, 2)), min_size=1, max_size=12
)


@settings(max_examples=40)
@given(ARRIVALS, st.integers(4, 64))
def test_no_prompt_waits_longer_than_its_turn_at_a_part_of_each_step(
    arrivals: list[tuple[int, int, int]], budget: int
) -> None:
    """``arrivals`` are (step, tokens, priority)."""
    arrivals.sort(key=lambda a: a[0])
    left = [tokens for _, tokens, _ in arrivals]
    part = max(1, budget // PARTS)
    for step in range(3000):
        under_way = [i for i, (at, *_) in enumerate(arrivals) if at <= step and left[i]]
        prompts = [
            prompt(left[i], i, length=arrivals[i][1], priority=arrivals[i][2]) for i in under_way
        ]
        for i, share in zip(under_way, divide(prompts, budget), strict=True):
            left[i] -= share
            if share and not left[i]:
                before = [tokens for _, tokens, _ in arrivals[: i + 1]]
                latest = arrivals[i][0] + sum(math.ceil(tokens / part) for tokens in before)
                assert step <= latest
        if not any(left):
            return
    raise AssertionError(f"prompts starved: {left}")


@pytest.mark.parametrize(
    ("of_tenant", "budgets"),
    [
        ({"a": [prompt(500, 0)]}, [100]),
        ({"a": [prompt(500, 0)] * 9, "b": [prompt(500, 9)]}, [50, 50]),
        ({"a": [prompt(500, 0)] * 9, "b": [prompt(20, 9)]}, [80, 20]),
        ({"a": [prompt(500, 0)], "b": [prompt(20, 1)], "c": [prompt(500, 2)]}, [40, 20, 40]),
        ({"a": [prompt(5, 0)], "b": [prompt(20, 1)]}, [5, 20]),
        ({"a": [prompt(500, 0, priority=1)], "b": [prompt(70, 1)]}, [30, 70]),
        ({"a": [prompt(9, 0), prompt(500, 0, priority=1)], "b": [prompt(500, 1)]}, [9, 91]),
        ({"a": [prompt(500, 0)], "b": [prompt(500, 1)], "c": [prompt(500, 2)]}, [34, 33, 33]),
    ],
)
def test_tenants_have_even_shares_of_a_hundred_tokens(
    of_tenant: dict[str, list[Prompt]], budgets: list[int]
) -> None:
    assert list(tenant_budgets(of_tenant, 100).values()) == budgets
