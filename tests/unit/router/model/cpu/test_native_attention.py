"""Decodes that read the cache natively, against attention in float64 and against each other."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.native import built
from router.model.attention import Scoring
from router.model.cpu import native_attention as decoding
from router.model.cpu.native_attention import attend_cached, can_attend_cached
from router.model.kv_cache import LatentCache, PagedCache
from router.model.paged_attention import attend_gathered

CPU = torch.device("cpu")
PAGE_SIZE = 16
BUILT = [] if built.native is None else [built.native]
IS_WIDE = built.native is not None and built.native.is_wide()


@dataclass
class Case:
    query: torch.Tensor  # [Q, B, D]
    keys: torch.Tensor  # [N, P, G, D]
    values: torch.Tensor  # [N, P, G, D]
    slots: torch.Tensor  # [B, L]
    mask: torch.Tensor | None  # [B, 1, L]
    scaling: float

    def attend(self) -> torch.Tensor:
        """Return [B, Q, D]."""
        return attend_cached(
            self.query, self.keys, self.values, self.slots, self.mask, self.scaling
        )[0]

    def exact(self) -> torch.Tensor:
        """Return [B, Q, D] in float64, one sequence and head after the other."""
        num_q, num_seqs, size = self.query.shape
        output = torch.empty(num_seqs, num_q, size, dtype=torch.float64)
        all_keys, all_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)  # [S, G, D]
        for b in range(num_seqs):
            seen = self.slots[b] if self.mask is None else self.slots[b][self.mask[b, 0]]
            for q in range(num_q):
                g = q // (num_q // self.keys.shape[2])
                keys, values = all_keys[seen, g].double(), all_values[seen, g].double()
                shares = (keys @ self.query[q, b].double() * self.scaling).softmax(0)
                output[b, q] = shares @ values
        return output

    def of(self, sequence: int) -> Case:
        """Return one sequence alone, without its padding."""
        slots, mask = self.slots[sequence : sequence + 1], None
        if self.mask is not None:
            slots = slots[:, self.mask[sequence, 0]]
        alone = self.query[:, sequence : sequence + 1]
        return Case(alone, self.keys, self.values, slots, mask, self.scaling)


def make(
    seed: int,
    *,
    num_seqs: int,
    num_kv: int,
    heads: int,
    size: int,
    length: int,
    hides: bool,
    spread: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_pages = (num_seqs * length + 5) // PAGE_SIZE + 1
    num_slots = num_pages * PAGE_SIZE

    def randn(*shape: int) -> torch.Tensor:
        return (spread * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    # As the model's: tokens first, seen with heads first.
    query = randn(num_seqs, num_kv * heads + 2, size).transpose(0, 1)[1:-1]
    keys, values = (randn(num_pages, PAGE_SIZE, num_kv, size) for _ in range(2))
    slots = torch.randperm(num_slots, generator=generator)[: num_seqs * length]
    mask = None
    if hides:
        mask = torch.rand(num_seqs, 1, length, generator=generator) < 0.6
        mask[:, :, int(torch.randint(length, (), generator=generator))] = True
    return Case(query, keys, values, slots.view(num_seqs, length), mask, size**-0.5)


CASES = st.builds(
    make,
    st.integers(0, 10_000),
    num_seqs=st.integers(1, 5),
    num_kv=st.integers(1, 3),
    heads=st.integers(1, 9),
    size=st.sampled_from([1, 2, 8, 31, 32, 40, 64, 80, 96, 128]),
    length=st.integers(1, 50),
    hides=st.booleans(),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
)


def one_rounding_off(exact: torch.Tensor) -> torch.Tensor:
    """Return how far a value may be that is computed in float32 and rounded to bfloat16 once."""
    return exact.abs() * 2**-8 + 2e-5 * exact.abs().max()


@pytest.mark.parametrize("native", BUILT)
@settings(deadline=None, max_examples=120)
@given(case=CASES)
def test_all_but_one_rounding_is_exact(native: ModuleType, case: Case) -> None:
    assert can_attend_cached(case.query, case.keys, case.values) == IS_WIDE
    exact = case.exact()
    assert ((case.attend().double() - exact).abs() <= one_rounding_off(exact)).all()


@pytest.mark.parametrize("native", BUILT)
@settings(deadline=None, max_examples=40)
@given(case=CASES)
def test_neither_other_sequences_nor_padding_change_a_bit(native: ModuleType, case: Case) -> None:
    together = case.attend()
    for sequence in range(len(case.slots)):
        assert torch.equal(together[sequence], case.of(sequence).attend()[0])


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("num_seqs", [1, 7])
def test_threads_change_no_bit(
    native: ModuleType, num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 7 * 700 * 24 * 128 values are worth seven threads, one sequence's are worth one.
    case = make(3, num_seqs=num_seqs, num_kv=4, heads=6, size=128, length=700, hides=True)
    outputs = []
    for threads in (1, 2, 7, 1000):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outputs.append(case.attend())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    exact = case.exact()
    assert ((outputs[0].double() - exact).abs() <= one_rounding_off(exact)).all()


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize(("threads", "are_more"), [(1, False), (3, True)])
def test_as_many_threads_compute_as_torch_has(
    native: ModuleType, threads: int, are_more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(4, num_seqs=4, num_kv=4, heads=8, size=128, length=2000, hides=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ends, most = threading.Event(), 0

    def repeat() -> None:
        deadline_s = time.monotonic() + 10
        while not ends.is_set() and time.monotonic() < deadline_s:
            case.attend()

    attending, process = threading.Thread(target=repeat), psutil.Process()
    before = process.num_threads() + 1
    attending.start()
    deadline_s = time.monotonic() + (10 if are_more else 0.5)
    while time.monotonic() < deadline_s and most < threads - 1:
        most = max(most, process.num_threads() - before)
    ends.set()
    attending.join()
    assert (most >= threads - 1) if are_more else most == 0


@pytest.mark.parametrize("native", BUILT)
def test_what_is_not_seen_counts_for_nothing_and_what_is_no_number_is_told(
    native: ModuleType,
) -> None:
    case = make(5, num_seqs=2, num_kv=2, heads=2, size=64, length=20, hides=True)
    before = case.attend()
    hidden = case.slots[~case.mask[:, 0]]
    for cached in (case.keys, case.values):
        cached.flatten(0, 1)[hidden] = torch.nan
    assert torch.equal(case.attend(), before)
    seen = case.slots[0][case.mask[0, 0]]
    for wrong in (torch.nan, torch.inf):
        case.keys.flatten(0, 1)[seen[-1], 0] = wrong
        output = case.attend()
        assert output[0, :2].isnan().all()  # the heads that share those keys
        assert torch.equal(output[0, 2:], before[0, 2:])
        assert torch.equal(output[1], before[1])


@pytest.mark.parametrize("native", BUILT)
def test_a_key_that_outshines_all_others_is_all_that_counts(native: ModuleType) -> None:
    case = make(6, num_seqs=1, num_kv=1, heads=1, size=64, length=33, hides=False)
    case.keys.flatten(0, 1)[case.slots[0, 17], 0] = 1000 * case.query[0, 0].sign()
    assert torch.equal(case.attend()[0, 0], case.values.flatten(0, 1)[case.slots[0, 17], 0])


def test_without_native_code_and_for_other_kinds_of_cache_keys_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make(7, num_seqs=2, num_kv=2, heads=2, size=64, length=20, hides=False)
    wide = case.query.float()
    assert not can_attend_cached(wide, case.keys.float(), case.values.float())
    assert not can_attend_cached(wide, case.keys, case.values)
    assert not can_attend_cached(case.query.transpose(1, 2), case.keys, case.values)
    latents = LatentCache(1, (4, 16), 48, 16, torch.bfloat16, CPU)
    assert not can_attend_cached(case.query, latents.keys[0], latents.values[0])
    for attribute, value in (("native", None), ("_IS_WIDE", False)):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, attribute, value)
            assert not can_attend_cached(case.query, case.keys, case.values)
    cache = PagedCache(1, case.keys.shape[:2], 2, 64, torch.bfloat16, CPU)
    heads_first = (cached.flatten(0, 1).transpose(0, 1) for cached in (case.keys, case.values))
    cache.store(0, torch.arange(cache.keys[0].shape[0] * PAGE_SIZE), *heads_first)
    assert torch.equal(cache.keys[0], case.keys)
    scoring = Scoring(case.scaling)
    gathered = attend_gathered(case.query, *cache.gather(0, case.slots), None, scoring)[0]
    exact = case.exact()
    assert ((gathered.double() - exact).abs() <= 3 * one_rounding_off(exact).max()).all()


@pytest.mark.parametrize(
    ("key_dtype", "key_shape"),
    [
        (torch.float16, (2, 3, 8)),
        (torch.bfloat16, (2, 3, 9)),
        (torch.bfloat16, (1, 3, 8)),
        (torch.bfloat16, (2, 4, 8)),
    ],
    ids=["another dtype", "other sizes", "fewer heads", "more tokens than slots"],
)
def test_what_does_not_fit_the_cache_is_refused(
    key_dtype: torch.dtype, key_shape: tuple[int, ...]
) -> None:
    cache = PagedCache(1, (2, 8), 2, 8, torch.bfloat16, CPU)
    wrong = torch.ones(key_shape, dtype=key_dtype)
    with pytest.raises((RuntimeError, IndexError)):
        cache.store(0, torch.arange(3), wrong, wrong)


def test_no_new_token_is_no_error() -> None:
    cache = PagedCache(1, (2, 8), 2, 8, torch.bfloat16, CPU)
    none = torch.empty(2, 0, 8, dtype=torch.bfloat16)
    cache.store(0, torch.arange(0), none, none)


@pytest.mark.parametrize("native", [None, *BUILT])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    num_heads=st.integers(1, 4),
    num_tokens=st.integers(1, 9),
    size=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_new_keys_and_values_come_to_their_slots_and_nowhere_else(
    native: ModuleType | None,
    seed: int,
    num_heads: int,
    num_tokens: int,
    size: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(1, num_tokens, 2 * num_heads + 1, size, generator=generator).to(dtype)
    key = both[0, :, :num_heads].transpose(0, 1)
    value = both[0, :, num_heads + 1 :].transpose(0, 1)
    slots = torch.randperm(16, generator=generator)[:num_tokens]
    cache = PagedCache(2, (2, 8), num_heads, size, dtype, CPU)
    for stored in (*cache.keys, *cache.values):
        stored.fill_(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.model.kv_cache.native", native)
        cache.store(1, slots, key, value)
    for stored, rows in ((cache.keys[1], key), (cache.values[1], value)):
        expected = torch.full_like(stored, 7)
        for token, slot in enumerate(slots.tolist()):
            expected[slot // 8, slot % 8] = rows[:, token]
        assert torch.equal(stored, expected)
    assert (cache.keys[0] == 7).all()
    assert (cache.values[0] == 7).all()
    table = slots.repeat(2, 1).flip(1)  # [B, L]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.model.kv_cache.native", native)
        for gathered, rows in zip(cache.gather(1, table), (key, value), strict=True):
            assert torch.equal(gathered, rows.flip(1).unsqueeze(1).expand(-1, 2, -1, -1))


SIZES = (2, 1, 3, 2, 1, 2, 2)  # B, G, S, D, Q, and strides


def attended(
    native: ModuleType,
    query: int = 8,
    keys: int = 12,
    values: int = 12,
    slots: tuple[int, ...] = (0, 1, 2, 0),
    mask: bytes | None = None,
    room: int = 8,
    sizes: object = SIZES,
    scaling: object = 1.0,
    threads: int = 1,
) -> None:
    out = bytearray(room)
    all_slots = torch.tensor(slots, dtype=torch.int64).numpy()
    native.attend(
        bytes(query), bytes(keys), bytes(values), all_slots, mask, out, sizes, scaling, threads
    )


def sizes_but(place: int, value: int) -> tuple[int, ...]:
    return (*SIZES[:place], value, *SIZES[place + 1 :])


ROWS, SLOTS = bytes(16), torch.arange(2).numpy()


def stored(
    native: ModuleType, sizes: object = (2, 3, 4, 8, 4), rows: int = 16, room: int = 24
) -> None:
    native.store(bytes(rows), bytearray(room), SLOTS, sizes)


def gathered(
    native: ModuleType, sizes: object = (2, 3, 4), cached: int = 24, room: int = 16
) -> None:
    native.gather_heads(bytes(cached), SLOTS, bytearray(room), sizes)


WRONG = {
    "attend, a slot too large": lambda n: attended(n, slots=(0, 1, 2, 3)),
    "attend, a slot below": lambda n: attended(n, slots=(0, 1, 2, -1)),
    "attend, no slots": lambda n: attended(n, slots=()),
    "attend, not as many slots each": lambda n: attended(n, slots=(0, 1, 2)),
    "attend, too few queries": lambda n: attended(n, query=6),
    "attend, too few keys": lambda n: attended(n, keys=8),
    "attend, too few values": lambda n: attended(n, values=8),
    "attend, too little mask": lambda n: attended(n, mask=bytes([1, 1, 1])),
    "attend, nothing seen": lambda n: attended(n, mask=bytes([1, 1, 0, 0])),
    "attend, no room": lambda n: attended(n, room=4),
    "attend, no thread": lambda n: attended(n, threads=0),
    "attend, too few sizes, an argument's type": lambda n: attended(n, sizes=SIZES[:6]),
    "attend, sizes of another type": lambda n: attended(n, sizes=list(SIZES)),
    "attend, scaling of another type": lambda n: attended(n, scaling="1"),
    **{
        f"attend, size {place} is {value}": lambda n, place=place, value=value: attended(
            n, sizes=sizes_but(place, value)
        )
        for place in range(7)
        for value in (-1, *((0,) if place < 5 else ()), 2**62)
    },
    "gather, too few rows": lambda n: gathered(n, cached=20),
    "gather, no room": lambda n: gathered(n, room=12),
    "gather, a slot too large": lambda n: gathered(n, sizes=(2, 1, 4), cached=8),
    "gather, sizes of another type": lambda n: gathered(n, sizes=[2, 3, 4]),
    **{
        f"gather, size {place} is {value}": lambda n, place=place, value=value: gathered(
            n, sizes=tuple(value if i == place else (2, 3, 4)[i] for i in range(3))
        )
        for place in range(3)
        for value in (-1, 0, 2**62)
    },
    "store, too few rows": lambda n: stored(n, rows=12),
    "store, a cache too small": lambda n: stored(n, room=20),
    "store, a slot too large": lambda n: stored(n, sizes=(2, 1, 4, 8, 4), room=8),
    "store, sizes of another type": lambda n: stored(n, sizes=[2, 3, 4, 8, 4]),
    **{
        f"store, size {place} is {value}": lambda n, place=place, value=value: stored(
            n, sizes=tuple(value if i == place else (2, 3, 4, 8, 4)[i] for i in range(5))
        )
        for place in range(5)
        for value in (-1, *((0,) if place < 3 else ()), 2**62)
    },
}


@pytest.mark.parametrize("native", BUILT)
def test_what_the_wrong_cases_start_from_is_right(native: ModuleType) -> None:
    attended(native)
    attended(native, mask=bytes([1, 0, 0, 1]))
    stored(native)
    gathered(native)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("native", BUILT)
def test_wrong_numbers_are_refused_and_nothing_beyond_is_touched(
    case: str, native: ModuleType
) -> None:
    with pytest.raises(TypeError if "type" in case else ValueError, match=r"\w"):
        WRONG[case](native)


@pytest.mark.parametrize("native", BUILT)
def test_buffers_are_let_go(native: ModuleType) -> None:
    out, cached = bytearray(8), bytearray(24)
    slots = torch.tensor([0, 1, 2, 0]).numpy()
    keys = bytearray(12)
    for threads in (1, 0):
        with suppress(ValueError):
            native.attend(bytes(8), keys, bytes(12), slots, None, out, SIZES, 1, threads)
    native.store(ROWS, cached, SLOTS, (2, 3, 4, 8, 4))
    for buffer in (out, keys, cached):
        buffer.append(1)  # no view of it is held any more
