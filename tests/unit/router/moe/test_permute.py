"""Rows of a layer, natively and by numpy and torch, against loops over single numbers."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import router.moe.combine
from cluster import native as built
from cluster.wire.tensors import to_bytes, to_raw
from router.moe import permute as rows
from router.moe.combine import ExpertRows, combine, prepare
from router.moe.permute import Share, gather, route, summands_of

IMPLEMENTATIONS = [None] if built.native is None else [None, built.native]
FACES = (rows, router.moe.combine)


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda native: "numpy" if native is None else "native")
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for face in FACES:
        monkeypatch.setattr(face, "native", request.param)


def each() -> Iterator[ModuleType | None]:
    try:
        for one in IMPLEMENTATIONS:
            for face in FACES:
                face.native = one  # type: ignore[attr-defined]
            yield one
    finally:
        for face in FACES:
            face.native = built.native  # type: ignore[attr-defined]


def test_native_code_is_there_where_it_can_be_built() -> None:
    assert built.native is not None or shutil.which("cc") is None


@st.composite
def choices(draw: st.DrawFn) -> np.ndarray:
    """Distinct experts for each token, [T, K], of at most nine."""
    k = draw(st.integers(1, 4))
    source = random.Random(draw(st.integers(0, 10_000)))
    tokens = draw(st.integers(1, 12))
    return np.array([source.sample(range(9), k) for _ in range(tokens)], np.int64)


@settings(max_examples=80)
@given(choices(), st.integers(0, 10_000))
def test_pairs_are_routed_gathered_and_scattered_as_loops_do_it(ids: np.ndarray, seed: int) -> None:
    source = random.Random(seed)
    k, flat = ids.shape[1], ids.ravel().tolist()
    some = sorted(source.sample(range(len(flat)), source.randint(1, len(flat))))
    values = torch.arange(ids.shape[0] * 5, dtype=torch.int16).view(torch.bfloat16).view(-1, 5)
    ordered_ids = source.sample(range(9), 9)
    index_of = [ordered_ids.index(expert) for expert in range(9)]
    ends = [*sorted(source.sample(range(9), source.randint(0, 4))), 9]
    expected = sorted(some, key=lambda pair: (index_of[flat[pair]], pair % k, pair))
    summand_of = [
        token * k + sorted(row).index(expert)
        for token, row in enumerate(ids.tolist())
        for expert in row
    ]
    for _ in each():
        ordered, shares = route(
            ids.ravel(), k, np.array(ordered_ids), np.array(ends), np.array(some, np.int64)
        )
        assert ordered.tolist() == expected
        assert shares == [*shares_of(ordered_ids, ends, [flat[pair] for pair in expected])]
        every = np.arange(ids.size)
        layer = ids.ravel(), k, np.array(ordered_ids), np.array(ends)
        (alike, of_all), (other, of_other) = route(*layer, None), route(*layer, every)
        assert (alike.tolist(), of_all) == (other.tolist(), of_other), "None is all pairs"
        assert summands_of(ids).tolist() == summand_of
        moved = gather(values, ordered, k)
        raw = to_raw(values)
        assert bytes(moved) == b"".join(raw[pair // k].tobytes() for pair in expected)


def shares_of(ordered_ids: list[int], ends: list[int], asked: list[int]) -> Iterator[Share]:
    """What each share has, counted one by one; ``asked`` are the pairs' experts in order."""
    begin = index = 0
    for end in ends:
        experts = [e for e in ordered_ids[index:end] if e in asked]
        counts = [asked.count(expert) for expert in experts]
        yield tuple(experts), tuple(counts), begin, begin + sum(counts)
        begin, index = begin + sum(counts), end


def received_in(pieces: int, values: torch.Tensor, summand_of: np.ndarray) -> list[ExpertRows]:
    """The rows as so many actors would send them: the row of a pair is that of its summand."""
    raw = to_raw(values)
    return [
        ExpertRows(pairs.copy(), raw[summand_of[pairs]].tobytes())
        for pairs in (np.arange(summand_of.size)[number::pieces] for number in range(pieces))
    ]


def slow_sum(values: torch.Tensor, weights: torch.Tensor, summand_of: list[int]) -> torch.Tensor:
    """Sum in the order of the summands, each step rounded by torch to the rows' own dtype."""
    k, sums = weights.shape[1], []
    for token in range(weights.shape[0]):
        weight_of = {summand_of[token * k + rank]: weights[token, rank] for rank in range(k)}
        total = None
        for summand in sorted(weight_of):
            weighted = [(value * weight_of[summand]).to(values.dtype) for value in values[summand]]
            total = weighted if total is None else [a + b for a, b in zip(total, weighted)]  # noqa: B905
        sums.append(torch.stack(total))
    return torch.stack(sums)


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


@settings(max_examples=60)
@given(choices(), st.sampled_from(DTYPES), st.integers(0, 10_000))
def test_sums_have_the_bits_of_sums_that_are_rounded_step_by_step(
    ids: np.ndarray, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 1 + seed % 40
    scale = torch.exp(8 * torch.randn(ids.size, 1, generator=generator))
    values = (torch.randn(ids.size, size, generator=generator) * scale).to(dtypes[0])
    weights = torch.rand(ids.shape, generator=generator).to(dtypes[1])
    for _ in each():
        summand_of = summands_of(ids)
        expected = slow_sum(values, weights, summand_of.tolist())
        like = torch.empty(ids.shape[0], size, dtype=dtypes[0])
        received = received_in(1 + seed % 4, values, summand_of)
        got, is_finite = combine(received, prepare(weights, summand_of, like))
        assert is_finite is bool(expected.isfinite().all())
        assert got.dtype == dtypes[0]
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_and_what_is_halfway_are_rounded_as_torch_rounds(
    dtype: torch.dtype,
) -> None:
    inf, nan = float("inf"), float("nan")
    numbers = [inf, -inf, nan, 0.0, -0.0, 3.3e38, -3.3e38, 1e-45, 1.00390625, 1.01171875, 257.0]
    values = torch.tensor([numbers, numbers[::-1]]).to(dtype)
    for weight in (0.0, 1.0, -1.0, 1.5, inf, 1.00390625):
        weights = torch.tensor([[weight, 1.0]])
        received = [ExpertRows(np.array([1, 0]), to_bytes(values))]
        got, is_finite = combine(received, prepare(weights, np.array([1, 0]), values[:1]))
        assert not is_finite
        expected = slow_sum(values, weights, [1, 0])
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.usefixtures("native")
def test_a_large_sum_is_as_its_single_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.moe.combine.CHUNK_VALUES", 1 << 12)  # several pieces
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, 700, generator=generator).bfloat16()  # moved without the interpreter
    weights = torch.rand(200, 2, generator=generator)
    summand_of, like = np.arange(400), values[:200]
    got, is_finite = combine(
        [ExpertRows(summand_of, to_bytes(values))], prepare(weights, summand_of, like)
    )
    assert is_finite
    for token in range(0, 200, 7):
        own = [ExpertRows(summand_of[:2], to_bytes(values[2 * token : 2 * token + 2]))]
        expected, _ = combine(own, prepare(weights[token : token + 1], summand_of[:2], like[:1]))
        assert torch.equal(got[token : token + 1], expected)
    sums, is_finite = combine([], prepare(weights[:0], summand_of[:0], like[:0]))
    assert sums.shape == (0, 700)
    assert is_finite


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_pairs_whose_rows_were_not_received_are_zeros(dtype: torch.dtype) -> None:
    rows = torch.tensor([[3.0, 4.0], [5.0, 6.0]]).to(dtype)
    weights, summand_of = torch.tensor([[0.5, 1.0], [1.0, 2.0]]), np.array([1, 0, 2, 3])
    received = [ExpertRows(np.array([3, 0]), to_bytes(rows))]
    assert combine(received, prepare(weights, summand_of, rows))[0].tolist() == [
        [2.5, 3.0],
        [6.0, 8.0],
    ]
    assert combine([], prepare(weights, summand_of, rows))[0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.usefixtures("native")
def test_rows_are_summed_from_wherever_they_lie() -> None:
    values = torch.arange(6.0).view(2, 3)
    apart = memoryview(b"x" + bytes(to_bytes(values)))[1:]  # not where a float would begin
    weights, summand_of = torch.tensor([[1.0], [10.0]]), np.arange(2)
    sums, _ = combine([ExpertRows(summand_of, apart)], prepare(weights, summand_of, values))
    assert sums.tolist() == [[0, 1, 2], [30, 40, 50]]


@pytest.mark.usefixtures("native")
def test_many_rows_are_moved_whole() -> None:
    values = torch.randn(600, 512, generator=torch.Generator().manual_seed(1))
    order = np.random.default_rng(2).permutation(600)
    moved = gather(values, order, 1)
    assert bytes(moved) == values.numpy()[order].tobytes()
    ones = torch.ones(600, 1)
    sums, _ = combine([ExpertRows(order, moved)], prepare(ones, np.arange(600), values))
    assert torch.equal(sums, values)


def test_rows_that_do_not_lie_together_are_gathered_too() -> None:
    values = torch.arange(40.0).view(4, 10)[:, ::2]
    for _ in each():
        assert bytes(gather(values, np.array([3, 0]), 1)) == values.numpy()[[3, 0]].tobytes()
