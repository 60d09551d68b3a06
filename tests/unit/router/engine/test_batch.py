"""Packing a step: slots, positions and masks, and that packed attention is dense attention.

Dimension letters: T tokens, G key/value heads, Q query heads, D head size.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.batch import pack
from router.engine.sequence import ScheduledChunk, Sequence
from router.messages.request import GenerationRequest, SamplingParams
from router.model.attention.interface import Attention
from router.model.attention.paged import GatheredAttention, PagedContext, paged_attention
from router.model.cpu.native_attention import KERNELS, NativeAttention, NativeCache
from router.model.kv_cache import PagedCache
from router.model.page_pool import PagePool, pages_needed

CPU = torch.device("cpu")
PAGE_SIZE = 16
IMPLEMENTATIONS = [False, True] if KERNELS else [False]
"""Whether attention is native."""


def sequence_of(name: str, token_ids: list[int], pages: list[int], computed: int = 0) -> Sequence:
    prompt = tuple(token_ids)
    request = GenerationRequest(name, "m", prompt, SamplingParams(max_tokens=4), 0.0)
    sequence = Sequence(request, 0, list(token_ids), computed)
    sequence.occupy(pages, PAGE_SIZE)
    return sequence


def test_a_step_is_packed_as_worked_by_hand() -> None:
    # a decodes its 5th token, b its 2nd; c prefills tokens 2..5 of 7, d a whole prompt of 2.
    a = sequence_of("a", [10, 11, 12, 13, 14], [3], 4)
    b = sequence_of("b", [20, 21], [1], 1)
    c = sequence_of("c", [30, 31, 32, 33, 34, 35, 36], [0], 2)
    d = sequence_of("d", [40, 41], [2])
    work = [
        ScheduledChunk(c, 2, 5),
        ScheduledChunk(a, 4, 5),
        ScheduledChunk(d, 0, 2),
        ScheduledChunk(b, 1, 2),
    ]
    step = pack(work, GatheredAttention(3))
    view = step.pieces[0].batch.view
    assert step.token_ids.tolist() == [14, 21, 32, 33, 34, 40, 41]
    assert step.positions.tolist() == [4, 1, 2, 3, 4, 0, 1]
    assert step.pieces[0].batch.new_slots.tolist() == [52, 17, 2, 3, 4, 32, 33]
    assert step.sampled == (a, b, d)
    assert step.sample_rows.tolist() == [0, 1, 6]
    assert view.num_decode == 2
    # Padding repeats the first slot and is masked; the window shows the last 3 tokens.
    assert view.decode_slots.tolist() == [[48, 49, 50, 51, 52], [16, 17, 16, 16, 16]]
    assert view.decode_window_mask is not None
    assert view.decode_window_mask[:, 0].int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]
    # Layers without a window see all of it.
    assert view.decode_mask is not None
    assert view.decode_mask[:, 0].int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    first, second = view.chunks
    assert (first.start, first.end, first.slots.tolist()) == (2, 5, [0, 1, 2, 3, 4])
    assert first.window_mask is not None
    assert first.window_mask.int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert first.mask is not None
    assert first.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert (second.start, second.end, second.slots.tolist()) == (5, 7, [32, 33])
    # Plain causal attention says the same.
    assert second.mask is None
    assert second.window_mask is None


def test_the_native_view_has_each_sequences_tokens_and_pages() -> None:
    a = sequence_of("a", list(range(18)), [3, 1], 17)
    b = sequence_of("b", list(range(40)), [0, 5, 4], 15)
    view = (
        pack([ScheduledChunk(b, 15, 33), ScheduledChunk(a, 17, 18)], NativeAttention(None))
        .pieces[0]
        .batch.view
    )
    # First token, tokens, position of the first, where the pages begin; the decode comes first.
    assert view.spans.tolist() == [[0, 1, 17, 0], [1, 18, 15, 2]]
    assert view.pages.tolist() == [3, 1, 0, 5, 4]


class Layer:
    """One layer over a paged cache, fed step by step, beside the dense truth."""

    def __init__(
        self,
        num_pages: int,
        heads: int,
        kv_heads: int,
        layer_idx: int,
        dtype: torch.dtype = torch.float32,
        *,
        is_native: bool = False,
    ) -> None:
        self.heads, self.kv_heads, self.dtype, self.is_native = heads, kv_heads, dtype, is_native
        self.num_slots = num_pages * PAGE_SIZE
        self.cache = (
            NativeCache(2, num_pages, kv_heads, 8, dtype)
            if is_native
            else PagedCache(2, (num_pages, PAGE_SIZE), kv_heads, 8, dtype, CPU)
        )
        for cached in (*self.cache.keys, *self.cache.values):
            cached.fill_(1e4)  # a slot that is read before it is written shows
        self.module: Any = SimpleNamespace(layer_idx=layer_idx)

    def vectors(self, sequence: Sequence) -> list[torch.Tensor]:
        """Query [T, Q, D], key and value [T, G, D] of a sequence, a function of its name."""
        generator = torch.Generator().manual_seed(int(sequence.request.request_id))
        return [
            torch.randn(len(sequence.token_ids), num_heads, 8, generator=generator).to(self.dtype)
            for num_heads in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def packed(self, work: list[ScheduledChunk], window: int | None) -> dict[str, torch.Tensor]:
        """Run a step and return each sequence's new outputs, [T, Q, D]."""
        attention: Attention = (
            NativeAttention(window) if self.is_native else GatheredAttention(window)
        )
        step = pack(work, attention)
        ordered = sorted(work, key=lambda w: w.end - w.start > 1)
        parts = [[vector[w.start : w.end] for vector in self.vectors(w.sequence)] for w in ordered]
        query, key, value = (
            torch.cat([part[i] for part in parts]).transpose(0, 1).unsqueeze(0) for i in range(3)
        )
        has_window = [window is not None] * 2
        paged = PagedContext(self.cache, attention, step.pieces[0].batch, has_window)
        output, weights = paged_attention(
            self.module, query, key, value, None, scaling=0.3, paged=paged
        )
        assert weights is None
        split = output[0].split([w.end - w.start for w in ordered])
        return {w.sequence.request.request_id: part for w, part in zip(ordered, split, strict=True)}

    def dense(self, sequence: Sequence, window: int | None) -> torch.Tensor:
        """Return the outputs of all of a sequence's tokens by plain attention, [T, Q, D]."""
        query, key, value = (vector.float() for vector in self.vectors(sequence))
        key = key.repeat_interleave(self.heads // self.kv_heads, dim=1)
        value = value.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = torch.einsum("tqd,sqd->qts", query, key) * 0.3
        at = torch.arange(len(query))
        hidden = at[None, :] > at[:, None]
        if window is not None:
            hidden |= at[None, :] <= at[:, None] - window
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("qts,sqd->tqd", probabilities, value)


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 45), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from([(4, 2), (2, 2), (4, 1)]),
    st.integers(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(IMPLEMENTATIONS),
    st.randoms(use_true_random=False),
)
def test_packed_attention_over_any_mixture_of_work_is_dense_attention_of_each_sequence(
    lengths: list[int],
    window: int | None,
    heads: tuple[int, int],
    layer_idx: int,
    dtype: torch.dtype,
    is_native: bool,
    source: random.Random,
) -> None:
    pool = PagePool(sum(pages_needed(length + 4, PAGE_SIZE) for length in lengths), PAGE_SIZE)
    attention = Layer(pool.num_pages, *heads, layer_idx, dtype, is_native=is_native)
    scattered = pool.take(pool.num_pages)
    source.shuffle(scattered)
    pool.give_back(scattered)
    sequences = [
        sequence_of(str(i), list(range(length)), pool.take(pages_needed(length + 4, PAGE_SIZE)))
        for i, length in enumerate(lengths)
    ]
    got: dict[str, list[torch.Tensor]] = {str(i): [] for i in range(len(lengths))}
    while any(s.num_computed < len(s.token_ids) for s in sequences):
        unfinished = [s for s in sequences if s.num_computed < len(s.token_ids)]
        chosen = source.sample(unfinished, source.randint(1, len(unfinished)))
        work = []
        for sequence in chosen:
            left = len(sequence.token_ids) - sequence.num_computed
            count = 1 if source.random() < 0.4 else source.randint(1, left)
            work.append(
                ScheduledChunk(sequence, sequence.num_computed, sequence.num_computed + count)
            )
        for name, output in attention.packed(work, window).items():
            got[name].append(output)
        for item in work:
            item.sequence.num_computed = item.end
    for sequence in sequences:
        is_fp32 = dtype == torch.float32
        torch.testing.assert_close(
            torch.cat(got[sequence.request.request_id]).float(),
            attention.dense(sequence, window),
            rtol=1e-4 if is_fp32 else 2e-2,
            atol=1e-5 if is_fp32 else 2e-2,
        )


@pytest.mark.parametrize("is_native", IMPLEMENTATIONS)
def test_a_step_writes_only_the_slots_of_its_own_tokens(is_native: bool) -> None:
    attention = Layer(2, 2, 2, 1, is_native=is_native)
    sequence = sequence_of("5", list(range(10)), [1], 4)
    attention.packed([ScheduledChunk(sequence, 4, 7)], None)
    [keys] = attention.cache.gather(1, torch.arange(attention.num_slots)[None])[0].transpose(0, 1)
    written = (keys != 1e4).all(dim=-1).all(dim=0)
    assert np.flatnonzero(written.numpy()).tolist() == [20, 21, 22]
    assert (attention.cache.keys[0] == 1e4).all()
