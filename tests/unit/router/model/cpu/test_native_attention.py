"""Native attention against float64, and each token's bits in any company, chunk and kernel."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.model.attention.interface import Scoring, Span
from router.model.cpu.native_attention import KERNELS, NativeAttention
from tests.unit.router.model.cpu.attention_cases import (
    DTYPES,
    Case,
    cases,
    crowded,
    make,
    one_by_one,
    one_prefill,
    same_bits,
)

NAMES = [name for name, _ in KERNELS]
CLASSES = sorted({of for _, of in KERNELS})


def members(name: str) -> list[str]:
    return [kernel for kernel, of in KERNELS if of == name]


@pytest.mark.parametrize("kernel", NAMES)
@settings(max_examples=80)
@given(case=cases())
def test_results_are_off_by_roundings_of_float32_sums_alone(kernel: str, case: Case) -> None:
    for b, output in enumerate(case.run(one_prefill(case), kernel)):
        exact, bound = case.exact(b)
        assert ((output.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", NAMES)
@settings(max_examples=20)
@given(case=cases(), source=st.randoms(use_true_random=False))
def test_a_token_has_the_same_bits_decoded_alone_and_in_any_chunk_and_company(
    kernel: str, case: Case, source: random.Random
) -> None:
    alone = case.run(one_by_one(case), kernel)
    together = case.run(one_prefill(case), kernel, pages_seed=1)
    assert same_bits(alone, together)
    assert same_bits(alone, case.run(crowded(case, source), kernel, pages_seed=2))
    for b, output in enumerate(together):
        assert same_bits([output], case.of(b).run([[(0, case.lengths[b])]], kernel))


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=20)
@given(case=cases(), source=st.randoms(use_true_random=False))
def test_kernels_of_one_class_give_the_same_bits(
    name: str, case: Case, source: random.Random
) -> None:
    steps = crowded(case, source)
    first, *others = (case.run(steps, kernel) for kernel in members(name))
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 1)], 2),
        ([(600, 1)], 2),  # a decode
        ([(600, 63)], 2),
        ([(600, 64)], 4),
        ([(0, 64)], 2),  # a short prompt
        ([(0, 511)], 2),
        ([(0, 512)], 4),
        ([(600, 1)] * 64, 4),
        ([(0, 16)] * 32, 2),  # short prompts
        ([(0, 100), (700, 100)], 4),
        ([(0, 100), (300, 100)], 2),
    ],
)
def test_tokens_of_long_prompts_have_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]], expected: int
) -> None:
    """Spans are (first position, tokens)."""
    given = [Span(np.arange(start + count), start) for start, count in spans]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert NativeAttention(None, prefill_threads=4).view(given, 0).threads == expected
    assert NativeAttention(None, prefill_threads=1).view(given, 0).threads == 2


@pytest.mark.parametrize(("window", "dtype"), zip([None, 100, None], DTYPES, strict=True))
def test_neither_threads_nor_borders_of_chunks_change_a_bit_of_long_sequences(
    window: int | None, dtype: torch.dtype
) -> None:
    # Each chunk is worth several threads.
    case = make(3, lengths=[1100, 37, 450], dtype=dtype, heads=3, size=96, window=window)
    cut = [[(0, 500), (2, 450)], [(0, 300), (1, 30)], [(0, 299)], [(1, 1), (0, 1)], [(1, 6)]]
    expected = case.run(one_prefill(case))
    for threads in (1, 3, 1000):
        assert same_bits(expected, case.run(cut, threads=threads, pages_seed=threads))
        assert same_bits(expected, case.run(one_prefill(case), threads=threads))
    for b, output in enumerate(expected):
        exact, bound = case.exact(b)
        assert ((output.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", NAMES)
def test_shares_of_a_prefill_have_the_bits_of_the_whole(kernel: str) -> None:
    case = make(3, lengths=[300], dtype=torch.float32, heads=3, size=64)
    whole, in_shares = (case.run(one_prefill(case), kernel, threads=count) for count in (1, 4))
    assert same_bits(whole, in_shares)


@pytest.mark.parametrize("kernel", NAMES)
def test_a_share_is_e_to_the_power_of_its_score(kernel: str) -> None:
    scores = -torch.linspace(0, 120, 1201)
    # Each sequence has two tokens: the first has score 0 and value 0, the second its own and 1.
    pairs = torch.stack([torch.zeros_like(scores), scores], 1).reshape(-1, 2, 1, 1)
    values = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    num = len(scores)
    case = Case(
        queries=[torch.ones(2, 1, 1)] * num,
        keys=list(pairs),
        values=[values] * num,
        window=None,
        scoring=Scoring(1.0, None, None, False),
        has_latents=False,
    )
    outputs = case.run([[(i, 2) for i in range(num)]], kernel)
    shares = torch.stack([output[1].reshape(()) for output in outputs]).double()
    power = scores.double().exp()
    error = (shares / (power / (1 + power)) - 1).abs()
    assert error[scores >= -87].max() <= 4 * 2.0**-24
    assert not shares[scores < -87].any()


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000])
def test_every_kind_of_no_number_shows(bits: int, kernel: str) -> None:
    case = make(5, lengths=[50], dtype=torch.float32, heads=3)
    case.keys[0].view(torch.int32)[17, 1, 0] = bits
    [output] = case.run([[(0, 50)]], kernel)
    assert output[17:, 3:].isnan().all()
    assert output[:17].isfinite().all()
    assert output[:, :3].isfinite().all()


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_shows_where_it_is_seen_and_nowhere_else(
    dtype: torch.dtype, kernel: str
) -> None:
    for part in ("keys", "values"):
        case = make(5, lengths=[50, 21], dtype=dtype, heads=3, window=20)
        before = case.run(one_prefill(case), kernel)
        getattr(case, part)[0][17, 1] = torch.nan
        after = case.run([[(0, 9), (1, 21)], [(0, 41)]], kernel)
        assert same_bits([before[1]], [after[1]])
        seen = torch.zeros(50, 6, dtype=torch.bool)
        seen[17:37, 3:] = True  # tokens whose window has it, and the heads that share it
        assert torch.equal(after[0].isnan().all(-1), seen)
        assert torch.equal(after[0].isnan().any(-1), seen)
        assert torch.equal(after[0][~seen], before[0][~seen])


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_outshines_all_others_is_all_that_counts(
    dtype: torch.dtype, kernel: str
) -> None:
    case = make(6, lengths=[33], dtype=dtype, num_kv=1, heads=1, size=64)
    case.keys[0][17, 0] = 100 * case.queries[0][32, 0].sign()
    [output] = case.run(one_prefill(case), kernel)
    assert torch.equal(output[32, 0], case.values[0][17, 0])


@pytest.mark.parametrize("kernel", NAMES)
def test_a_sink_that_outshines_all_keys_leaves_nothing(kernel: str) -> None:
    case = make(7, lengths=[20], dtype=torch.float32, has_sinks=True)
    assert case.scoring.sinks is not None
    case.scoring.sinks[3] = 300.0
    [output] = case.run(one_prefill(case), kernel)
    assert (output[:, 3] == 0).all()
    assert (output[:, 4] != 0).all()
