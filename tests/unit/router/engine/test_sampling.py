"""Sampling against a slow plain oracle: what may be drawn, how often, and on what it depends.

Each test samples on the CPU and on an emulated device.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.staging import Staging
from router.engine import sampling
from router.engine.batch import sampling_of
from router.engine.sampling import Draw, Drawn, SamplingTensors, read
from router.messages.request import SamplingParams
from tests.emulated_device import EmulatedDevice, emulated_device

INF, NAN = float("inf"), float("nan")
_places: list[tuple[EmulatedDevice, Staging]] = []
"""The emulated device, where the test samples on it."""


@pytest.fixture(autouse=True, params=["cpu", "device"], scope="module")
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have :func:`sample` compute on the CPU, or on an emulated device."""
    if request.param == "cpu":
        yield
        return
    with emulated_device() as device:
        _places.append((device, Staging(device.device)))
        yield
        _places.clear()


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> Drawn:
    """Sample where the test does; on the device by a copy each way, and no other access."""
    made = sampling_of(list(draws))
    if not _places:
        return read(sampling.sample(logits, made.tensors, made.logprob_sizes), made)
    [(device, staging)] = _places
    logits = logits.to(device.device)
    with device.counted() as copies, torch.inference_mode():
        # As in a step, they go with its token ids.
        _, *tensors = staging.to_device(torch.arange(len(draws)), *made.tensors)
        sampled = staging.to_host(
            *sampling.sample(logits, SamplingTensors(*tensors), made.logprob_sizes)
        )
    assert (len(copies.to_device), len(copies.to_host)) == (1, 1)
    assert not copies.host_reads
    assert not copies.mixed
    return read(sampled, made)


def draw_of(position: int = 0, choice: int = 0, **params: float | int | None) -> Draw:
    return Draw(SamplingParams(max_tokens=1, **params), choice, position)  # type: ignore[arg-type]


def oracle(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The probability of every token that may be drawn, in plain Python."""
    top = max(logits)
    weights = {i: math.exp((x - top) / params.temperature) for i, x in enumerate(logits)}
    ordered = sorted(weights, key=lambda i: (-weights[i], i))
    if params.top_k:
        ordered = ordered[: params.top_k]
    total = sum(weights[i] for i in ordered)
    kept: list[int] = []
    reached = 0.0
    for i in ordered:
        if kept and reached >= params.top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * weights[ordered[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept if weights[i] > 0}


def token_ids_of(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """Draw rows that all have a token."""
    token_ids = [token_id for token_id in sample(logits, draws).token_ids if token_id is not None]
    assert len(token_ids) == len(draws)
    return token_ids


def drawn(logits: list[float], params: SamplingParams, count: int) -> Counter[int]:
    """How often each token is drawn at ``count`` positions."""
    rows = torch.tensor([logits]).expand(count, -1)
    token_ids = token_ids_of(rows, [Draw(params, 0, position) for position in range(count)])
    return Counter(token_ids)


@pytest.mark.parametrize("row", [[NAN] * 3, [0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_does_not_disturb_its_mates(
    row: list[float], temperature: float
) -> None:
    draws = [draw_of(temperature=temperature, logprobs=2), draw_of(logprobs=2)]
    found = sample(torch.tensor([row, [0.0, -INF, -INF]]), draws)
    assert found.token_ids == [None, 0]
    assert found.logprobs[0] is None
    assert found.logprobs[1] is not None
    assert found.logprobs[1].logprob == 0.0


@settings(max_examples=30)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12))
def test_temperature_zero_takes_the_first_of_the_largest_logits(logits: list[float]) -> None:
    rows = torch.tensor([logits, [*logits[::-1]]])
    first, second = token_ids_of(rows, [draw_of(temperature=0.0)] * 2)
    assert first == logits.index(max(logits))
    assert second == logits[::-1].index(max(logits))


LOGITS = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=8)


PARAMS = st.builds(
    SamplingParams,
    st.just(1),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.integers(0, 9),
    # Off the values at which rounding decides; those are worked by hand below.
    st.sampled_from([0.0713, 0.2971, 0.5039, 0.7193, 0.9017, 0.9871, 1.0]),
    st.sampled_from([0.0, 0.0317, 0.1093, 0.4931, 0.8137]),
    seed=st.just(5),
)


@settings(max_examples=20)
@given(LOGITS, st.lists(PARAMS, min_size=9, max_size=9))
def test_only_what_the_filters_leave_is_drawn_and_all_of_it(
    logits: list[float], kinds: list[SamplingParams]
) -> None:
    draws = [Draw(params, 0, position) for params in kinds for position in range(400)]
    token_ids = token_ids_of(torch.tensor([logits]).expand(len(draws), -1), draws)
    for i, params in enumerate(kinds):
        allowed = oracle(logits, params)
        seen = set(token_ids[400 * i : 400 * i + 400])
        assert seen <= set(allowed)
        # Whatever has 5 % fails to come 400 times with a chance of 1e-9.
        assert {i for i, p in allowed.items() if p > 0.05} <= seen


FILTERS = [
    SamplingParams(1, 1.0, seed=1),
    SamplingParams(1, 0.6, seed=2),
    SamplingParams(1, 1.7, seed=3),
    SamplingParams(1, 1.0, top_k=3, seed=4),
    SamplingParams(1, 1.0, top_p=0.8, seed=5),
    SamplingParams(1, 1.0, min_p=0.2, seed=6),
    SamplingParams(1, 1.3, top_k=5, top_p=0.9, min_p=0.1, seed=7),
]
OVER = [(params, "positions") for params in FILTERS] + [
    (params, over) for params in (FILTERS[0], FILTERS[-1]) for over in ("seeds", "choices")
]


# The 99.9999 % quantile of chi-square is below df + 5 * sqrt(2 * df) + 15 for small df.
@pytest.mark.parametrize(("params", "over"), OVER)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(
    params: SamplingParams, over: str
) -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -3.0]
    count = 10_000
    probabilities = oracle(logits, params)
    rows = torch.tensor([logits]).expand(count, -1)
    draws = {
        "positions": [Draw(params, 0, i) for i in range(count)],
        "choices": [Draw(params, i, 3) for i in range(count)],
        "seeds": [Draw(replace(params, seed=params.seed + 7 * i), 0, 3) for i in range(count)],
    }[over]
    seen = Counter(token_ids_of(rows, draws))
    assert set(seen) <= set(probabilities)
    statistic = sum((seen[i] - count * p) ** 2 / (count * p) for i, p in probabilities.items())
    freedom = len(probabilities) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 15


def test_consecutive_positions_are_independent() -> None:
    token_ids = token_ids_of(
        torch.zeros(20_000, 2), [draw_of(position=i, seed=9) for i in range(20_000)]
    )
    pairs = Counter(itertools.pairwise(token_ids))
    for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert pairs[pair] == pytest.approx(5000, abs=400)


SHARES = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
MIN_SHARES = [math.log(p) for p in (0.5, 0.26, 0.12, 0.12)]
ALLOWED: dict[str, tuple[list[float], SamplingParams, set[int]]] = {
    "top_p below the first": (SHARES, SamplingParams(1, top_p=0.49), {0}),
    "top_p above the first": (SHARES, SamplingParams(1, top_p=0.51), {0, 1}),
    "top_p below the second": (SHARES, SamplingParams(1, top_p=0.74), {0, 1}),
    "top_p above the second": (SHARES, SamplingParams(1, top_p=0.76), {0, 1, 2}),
    # Of the two that top-k leaves, the first has 2/3: enough for 0.6, not for 0.7.
    "top_p of top_k's": (SHARES, SamplingParams(1, top_k=2, top_p=0.6), {0}),
    "more top_p of top_k's": (SHARES, SamplingParams(1, top_k=2, top_p=0.7), {0, 1}),
    "min_p of a half": (MIN_SHARES, SamplingParams(1, min_p=0.5), {0, 1}),
    "min_p of a fifth": (MIN_SHARES, SamplingParams(1, min_p=0.2), {0, 1, 2, 3}),
    "min_p of all": (MIN_SHARES, SamplingParams(1, min_p=1.0), {0}),
    "a temperature that underflows": ([0.5, 2.0, 1.0], SamplingParams(1, 1e-46), {1}),
    "the least temperature": ([0.5, 2.0, 1.0], SamplingParams(1, 5e-324), {1}),
    "the least top_p": ([0.5, 2.0, 1.0], SamplingParams(1, top_p=5e-324), {1}),
    "a tiny temperature": ([1.0, 1.5, 1.4], SamplingParams(1, 1e-9), {1}),
    "a tiny temperature and huge logits": ([-1e30, 1e30, 9e29], SamplingParams(1, 1e-9), {1}),
    "a huge temperature": ([0.0, 1.0, 2.0], SamplingParams(1, 100.0), {0, 1, 2}),
    "a tiny top_p": ([0.0, 1.0, 2.0], SamplingParams(1, 1.0, top_p=1e-12), {2}),
    "top_k of one": ([0.0, 5.0, 4.9], SamplingParams(1, 100.0, top_k=1), {1}),
    "top_k beyond the vocabulary": ([0.0, 0.0], SamplingParams(1, 1.0, top_k=10**6), {0, 1}),
    "impossible tokens": ([-INF, 0.0, -INF, 0.0], SamplingParams(1, 1.0), {1, 3}),
    "impossible tokens, hot": ([-INF, 0.0, -INF, 0.0], SamplingParams(1, 100.0), {1, 3}),
    "one possible token": ([-INF, -INF, 3.0], SamplingParams(1, 1.0, top_k=2), {2}),
    "all alike": ([2.0] * 4, SamplingParams(1, 1.0), {0, 1, 2, 3}),
    "all alike, the first two": ([2.0] * 4, SamplingParams(1, 1.0, top_k=2), {0, 1}),
    "all alike, at least as likely": ([2.0] * 4, SamplingParams(1, 1.0, min_p=1.0), {0, 1, 2, 3}),
    "a vocabulary of one": ([-7.0], SamplingParams(1, 1.0, top_k=3, top_p=0.1, min_p=0.9), {0}),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_exactly_what_is_allowed_is_drawn(name: str) -> None:
    logits, params, expected = ALLOWED[name]
    assert set(drawn(logits, params, 500)) == expected


DRAWS = [
    draw_of(0, 0, temperature=1.0, seed=1),
    draw_of(5, 0, temperature=0.0, seed=1),
    draw_of(5, 1, temperature=0.7, seed=2, top_k=3),
    draw_of(9, 0, temperature=1.3, seed=3, top_p=0.9),
    draw_of(9, 2, temperature=1.0, seed=3, min_p=0.05, logprobs=2),
    draw_of(2, 0, temperature=0.0, seed=3, logprobs=0),
]


@cache
def drawn_alone(seed: int, is_on_device: bool) -> tuple[torch.Tensor, list[Drawn]]:
    logits = torch.randn(len(DRAWS), 50, generator=torch.Generator().manual_seed(seed))
    return logits, [sample(logits[i : i + 1], [DRAWS[i]]) for i in range(len(DRAWS))]


@settings(max_examples=30)
@given(st.permutations(range(len(DRAWS))), st.integers(1, len(DRAWS)), st.integers(0, 3))
def test_a_draw_depends_neither_on_its_place_nor_on_its_mates(
    order: list[int], size: int, seed: int
) -> None:
    logits, alone = drawn_alone(seed, bool(_places))
    chosen = order[:size]
    drawn = sample(logits[chosen], [DRAWS[i] for i in chosen])
    assert drawn.token_ids == [alone[i].token_ids[0] for i in chosen]
    assert drawn.logprobs == [alone[i].logprobs[0] for i in chosen]


def test_rows_that_are_sampled_some_at_a_time_get_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(3))
    draws = [*DRAWS, *(draw_of(i, 1, seed=6, logprobs=i % 3) for i in range(6))]
    at_once = sample(logits, draws)
    monkeypatch.setattr(sampling, "VALUES_AT_ONCE", 120)  # two rows
    assert sample(logits, draws) == at_once
    monkeypatch.setattr(sampling, "VALUES_AT_ONCE", 1)
    assert sample(logits, draws) == at_once


def test_a_token_is_picked_in_the_order_of_the_vocabulary() -> None:
    """By hand: shares 0.125, 0.5 and 0.375 end at 0.125, 0.625 and 1."""
    logits = torch.tensor([[math.log(share) for share in (0.125, 0.5, 0.375)]]).expand(64, -1)
    draws = [draw_of(position, seed=3) for position in range(64)]
    uniforms = sampling_of(draws).tensors.warm_params[4].tolist()
    expected = [(uniform >= 0.125) + (uniform >= 0.625) for uniform in uniforms]
    assert token_ids_of(logits, draws) == expected


@pytest.mark.parametrize("what", ["seed", "choice", "position"])
def test_seed_choice_and_position_each_change_the_stream(what: str) -> None:
    rows = torch.zeros(64, 1000)
    draws = [draw_of(**{what: i}) for i in range(64)]
    assert len(set(token_ids_of(rows, draws))) > 55


def test_every_seed_that_a_request_may_have_works() -> None:
    seeds = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1]
    token_ids = token_ids_of(torch.zeros(7, 10**4), [draw_of(seed=seed) for seed in seeds])
    # -1 and 2**64 - 1 are the same 64 bits; all others have a stream of their own.
    assert token_ids[2] == token_ids[6]
    assert len(set(token_ids)) == 6


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_log_probabilities_are_those_of_the_logits_as_they_came_for_those_who_ask(
    temperature: float,
) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    draws = [
        draw_of(temperature=temperature, seed=i, top_k=2, logprobs=count)
        for i, count in enumerate((0, 4, 50, None))
    ]
    drawn = sample(logits, draws)
    assert torch.equal(logits, before)
    assert drawn.logprobs[3] is None
    for i, count in enumerate((0, 4, 20)):
        expected, found = logits[i].log_softmax(-1), drawn.logprobs[i]
        assert found is not None
        assert found.logprob == float(expected[drawn.token_ids[i]])
        top = expected.topk(count)
        assert found.top_ids == tuple(top.indices.tolist())
        assert found.top_logprobs == tuple(top.values.tolist())
