"""The retry policy: growing, capped, jittered delays, a budget, and never past a deadline."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from router.retry import Retries, RetryBudget, RetryPolicy

DRAW = st.floats(0, 1, exclude_max=True)
POLICY = st.builds(
    lambda first_s, multiplier, factor: RetryPolicy(first_s, multiplier, first_s * factor),
    st.floats(0.001, 10),
    st.floats(1, 10),
    st.floats(1, 1000),
)


@given(POLICY, st.integers(0, 10**9), DRAW)
def test_a_delay_is_within_its_bounds_however_many_failures_came_before(
    policy: RetryPolicy, failures: int, draw: float
) -> None:
    delay_s = policy.delay_s(failures, draw)
    assert delay_s is not None
    assert 0 <= delay_s <= policy.longest_s(failures) <= policy.max_delay_s
    assert policy.longest_s(failures) <= policy.longest_s(failures + 1) * (1 + 1e-9)
    assert policy.longest_s(0) == policy.first_delay_s


@given(POLICY, st.integers(0, 100), DRAW, st.floats(-10, 100), st.floats(0, 100))
def test_no_wait_reaches_the_deadline_or_is_shorter_than_asked(
    policy: RetryPolicy, failures: int, draw: float, remaining_s: float, retry_after_s: float
) -> None:
    delay_s = policy.delay_s(failures, draw, remaining_s, retry_after_s)
    if delay_s is None:
        assert policy.max_delay_s + retry_after_s >= remaining_s
    else:
        assert retry_after_s <= delay_s < remaining_s


def test_delays_double_up_to_the_cap() -> None:
    policy = RetryPolicy(first_delay_s=0.1, multiplier=2.0, max_delay_s=1.0)
    assert [policy.longest_s(i) for i in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert policy.delay_s(1, 0.5) == pytest.approx(0.1)


def test_the_same_seed_makes_the_same_delays() -> None:
    def delays(seed: int) -> list[float | None]:
        retries = Retries(RetryPolicy(), RetryBudget(), random.Random(seed).random)
        return [retries.next_delay_s(math.inf) for _ in range(8)]

    assert delays(1) == delays(1)
    assert delays(1) != delays(2)


def test_a_budget_ends_retries_at_half_and_successes_bring_them_back() -> None:
    budget = RetryBudget(max_tokens=10, token_ratio=0.5)
    assert [budget.failed() for _ in range(6)] == [True] * 4 + [False] * 2
    for _ in range(4):
        budget.succeeded()  # 4 tokens are 6 now
    assert budget.failed() is False
    for _ in range(3):
        budget.succeeded()
    assert budget.failed() is True


@given(st.lists(st.booleans(), max_size=200))
def test_a_budget_stays_within_its_bounds(outcomes: list[bool]) -> None:
    budget = RetryBudget(max_tokens=10, token_ratio=0.1)
    for is_success in outcomes:
        if is_success:
            budget.succeeded()
        else:
            budget.failed()
        assert 0 <= budget._tokens <= 10


def test_requests_share_a_budget_and_progress_makes_delays_short_again() -> None:
    budget = RetryBudget(max_tokens=10)
    first, second = (Retries(RetryPolicy(), budget, lambda: 0.5) for _ in range(2))
    assert [first.next_delay_s(9) for _ in range(2)] == pytest.approx([0.05, 0.1])
    first.progressed()
    assert first.next_delay_s(9) == pytest.approx(0.05)
    assert second.next_delay_s(9) == pytest.approx(0.05)
    assert second.next_delay_s(9) is None
    for _ in range(20):
        first.succeeded()
    assert second.next_delay_s(9) is not None


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"first_delay_s": -1}, "retry.first_delay_s"),
        ({"multiplier": 0.5}, "retry.multiplier"),
        ({"max_delay_s": 0.01}, "retry.max_delay_s"),
        ({"max_delay_s": math.inf}, "retry.max_delay_s"),
        ({"first_delay_s": math.nan}, "retry.first_delay_s"),
    ],
)
def test_a_policy_that_is_none_is_refused(kwargs: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RetryPolicy(**kwargs)
    assert caught.value.field == field
