"""Rows of a layer, natively and by numpy and torch, against loops over single numbers."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tensors import to_raw
from router import rows
from router.combine import combine
from router.rows import gather, route, scatter, slots_of

IMPLEMENTATIONS = [None] if rows.native is None else [None, rows.native]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda native: "numpy" if native is None else "native")
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "native", request.param)


def each() -> Iterator[ModuleType | None]:
    """Have each implementation in use, one after the other."""
    before = rows.native
    try:
        for rows.native in IMPLEMENTATIONS:
            yield rows.native
    finally:
        rows.native = before


def test_native_code_is_there_where_it_can_be_built() -> None:
    assert rows.native is not None or shutil.which("cc") is None


@st.composite
def choices(draw: st.DrawFn) -> np.ndarray:
    """Distinct experts for each token, [T, K], of at most nine."""
    k = draw(st.integers(1, 4))
    source = random.Random(draw(st.integers(0, 10_000)))
    tokens = draw(st.integers(1, 12))
    return np.array([source.sample(range(9), k) for _ in range(tokens)], np.int64)


@settings(deadline=None, max_examples=80)
@given(choices(), st.integers(0, 10_000))
def test_pairs_are_routed_gathered_and_scattered_as_loops_do_it(ids: np.ndarray, seed: int) -> None:
    source = random.Random(seed)
    k, flat = ids.shape[1], ids.ravel().tolist()
    place_of = source.sample(range(9), 9)
    some = sorted(source.sample(range(len(flat)), source.randint(1, len(flat))))
    values = np.arange(ids.shape[0] * 5, dtype=np.int16).reshape(-1, 5)
    expected = sorted(some, key=lambda pair: (place_of[flat[pair]], pair % k, pair))
    slots = [
        token * k + sorted(row).index(expert)
        for token, row in enumerate(ids.tolist())
        for expert in row
    ]
    for _ in each():
        ordered, counts = route(ids.ravel(), k, np.array(place_of), np.array(some, np.int64))
        assert ordered.tolist() == expected
        assert counts == [sum(place_of[flat[p]] == place for p in some) for place in range(9)]
        assert slots_of(ids).tolist() == slots
        received = gather(values, ordered, k)
        assert bytes(received) == b"".join(values[pair // k].tobytes() for pair in expected)
        output = np.zeros((len(flat), 5), np.int16)
        scatter(received, ordered, np.array(slots), output)
        for pair, slot in enumerate(slots):
            row = values[pair // k].tolist() if pair in some else [0] * 5
            assert output[slot].tolist() == row


def slow_sum(values: torch.Tensor, weights: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Sum in the order of the slots, each step rounded by torch to the rows' own dtype."""
    k, sums = weights.shape[1], []
    for token in range(weights.shape[0]):
        of_slot = {slots[token * k + rank]: weights[token, rank] for rank in range(k)}
        total = None
        for slot in sorted(of_slot):
            weighted = [(value * of_slot[slot]).to(values.dtype) for value in values[slot]]
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


@settings(deadline=None, max_examples=60)
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
        slots = slots_of(ids)
        expected = slow_sum(values, weights, slots.tolist())
        got = combine(to_raw(values), weights, slots, values.dtype)
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
        got = combine(to_raw(values), weights, np.array([1, 0]), values.dtype)
        expected = slow_sum(values, weights, [1, 0])
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.usefixtures("native")
def test_a_large_sum_is_as_its_single_tokens_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.combine.CHUNK_VALUES", 1 << 12)  # several pieces
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, 700, generator=generator).bfloat16()  # moved without the interpreter
    weights = torch.rand(200, 2, generator=generator)
    raw, dtype, slots = to_raw(values), values.dtype, np.arange(400)
    got = combine(to_raw(values), weights, slots, values.dtype)
    for token in range(0, 200, 7):
        own = combine(
            raw[2 * token : 2 * token + 2], weights[token : token + 1], np.arange(2), dtype
        )
        assert torch.equal(got[token : token + 1], own)
    assert combine(raw[:0], weights[:0], slots[:0], dtype).shape == (0, 700)


@pytest.mark.usefixtures("native")
def test_many_rows_are_moved_whole() -> None:
    values = np.random.default_rng(1).integers(0, 1000, (600, 512)).astype(np.int32)
    order = np.random.default_rng(2).permutation(600)
    moved = gather(values, order, 1)
    assert bytes(moved) == values[order].tobytes()
    back = np.empty_like(values)
    scatter(moved, order, np.arange(600), back)
    assert (back == values).all()


def test_rows_that_do_not_lie_together_are_gathered_too() -> None:
    values = np.arange(40, dtype=np.int16).reshape(4, 10)[:, ::2]
    for _ in each():
        assert bytes(gather(values, np.array([3, 0]), 1)) == values[[3, 0]].tobytes()


IDS, PAIRS = np.array([0, 1, 2, 0], np.int64), np.arange(4)
WRONG = {
    "slots, no expert each": lambda n: n.slots(IDS, 0, np.empty(4, np.int64)),
    "slots, not whole tokens": lambda n: n.slots(IDS, 3, np.empty(4, np.int64)),
    "slots, no room": lambda n: n.slots(IDS, 2, np.empty(3, np.int64)),
    "slots, too few arguments": lambda n: n.slots(IDS, 2),
    "route, an id too large": lambda n: n.route(IDS, 2, np.arange(2), PAIRS, PAIRS.copy()),
    "route, an id below": lambda n: n.route(IDS - 1, 2, np.arange(3), PAIRS, PAIRS.copy()),
    "route, a pair too large": lambda n: n.route(IDS, 2, np.arange(3), PAIRS + 1, PAIRS.copy()),
    "route, a pair below": lambda n: n.route(IDS, 2, np.arange(3), PAIRS - 1, PAIRS.copy()),
    "route, a place too large": lambda n: n.route(IDS, 2, np.arange(1, 4), PAIRS, PAIRS.copy()),
    "route, a place below": lambda n: n.route(IDS, 2, np.arange(3) - 1, PAIRS, PAIRS.copy()),
    "route, no room": lambda n: n.route(IDS, 2, np.arange(3), PAIRS, np.empty(3, np.int64)),
    "route, no expert each": lambda n: n.route(IDS, 0, np.arange(3), PAIRS, PAIRS.copy()),
    "route, too many experts each": lambda n: n.route(
        IDS, 2**62, np.arange(4), PAIRS, PAIRS.copy()
    ),
    "gather, too many experts each": lambda n: n.gather(bytes(8), PAIRS, 2**62, 4),
    "gather, too long rows": lambda n: n.gather(b"", PAIRS, 2, 2**62),
    "scatter, too long rows": lambda n: n.scatter(b"", PAIRS, PAIRS, bytearray(0), 2**62),
    "gather, a pair too large": lambda n: n.gather(bytes(8), PAIRS + 1, 2, 4),
    "gather, a pair below": lambda n: n.gather(bytes(8), PAIRS - 1, 2, 4),
    "gather, not whole rows": lambda n: n.gather(bytes(9), PAIRS, 2, 4),
    "gather, no bytes": lambda n: n.gather(bytes(8), PAIRS, 2, 0),
    "scatter, a pair too large": lambda n: n.scatter(bytes(8), PAIRS + 1, PAIRS, bytearray(8), 2),
    "scatter, a slot too large": lambda n: n.scatter(bytes(8), PAIRS, PAIRS + 1, bytearray(8), 2),
    "scatter, a slot below": lambda n: n.scatter(bytes(8), PAIRS, PAIRS - 1, bytearray(8), 2),
    "scatter, too few bytes": lambda n: n.scatter(bytes(7), PAIRS, PAIRS, bytearray(8), 2),
    "scatter, no room": lambda n: n.scatter(bytes(8), PAIRS, PAIRS, bytearray(6), 2),
    "combine, another's slot": lambda n: n.combine(
        bytes(16), bytes(16), PAIRS[::-1].copy(), 2, bytearray(8), 4
    ),
    "combine, a slot below": lambda n: n.combine(
        bytes(16), bytes(16), PAIRS - 1, 2, bytearray(8), 4
    ),
    "combine, no room": lambda n: n.combine(bytes(16), bytes(16), PAIRS, 2, bytearray(4), 4),
    "combine, odd values": lambda n: n.combine(bytes(16), bytes(16), PAIRS, 2, bytearray(8), 3),
    "combine, odd weights": lambda n: n.combine(bytes(16), bytes(12), PAIRS, 2, bytearray(8), 4),
    "combine, no pairs": lambda n: n.combine(b"", b"", PAIRS[:0].copy(), 2, bytearray(0), 4),
    "combine, odd rows": lambda n: n.combine(bytes(24), bytes(16), PAIRS, 2, bytearray(12), 4),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(case: str) -> None:
    for native in IMPLEMENTATIONS[1:]:
        with pytest.raises(TypeError if "arguments" in case else ValueError, match=r"\w"):
            WRONG[case](native)


def test_what_is_no_buffer_or_cannot_be_written_is_refused_and_let_go() -> None:
    for native in IMPLEMENTATIONS[1:]:
        values = bytearray(8)
        for wrong in (b"12345678", None, np.arange(8)[::2]):
            with pytest.raises((TypeError, ValueError, BufferError)):
                native.scatter(values, PAIRS, PAIRS, wrong, 2)
        values.append(1)  # no view of it is held any more
        with pytest.raises(TypeError):
            native.gather(values, PAIRS, "2", 2)
        with pytest.raises(OverflowError):
            native.gather(values, PAIRS, 2**70, 2)
        before = sys.getrefcount(PAIRS)
        for _ in range(100):
            native.gather(bytes(8), PAIRS, 2, 4)
        assert sys.getrefcount(PAIRS) == before
