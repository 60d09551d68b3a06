"""Sequences in a cache, attended step by step, beside attention in float64.

Dimension letters: L tokens of a sequence, G key/value heads, R query heads to each, Q = G * R, D
size of a key, V of a value.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from router.model.attention.interface import Scoring, Span
from router.model.cpu.native_attention import NATIVE_PAGE_SIZE, NativeAttention, NativeCache
from router.model.kv_cache import LatentCache, PagedCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far a value is off at most, relative to it, when it is rounded to the dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SINGLE = ROUNDING[torch.float32]
CPU = torch.device("cpu")
Step = list[tuple[int, int]]
"""The sequences of a step, and how many tokens each computes in it."""


@dataclass
class Case:
    """A layer, and the queries [L, Q, D], keys [L, G, D], values [L, G, V] of its sequences."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    window: int | None
    scoring: Scoring
    has_latents: bool

    @property
    def lengths(self) -> list[int]:
        return [len(query) for query in self.queries]

    def of(self, sequence: int) -> Case:
        query, key, value = ([part[sequence]] for part in self._parts())
        return Case(query, key, value, self.window, self.scoring, self.has_latents)

    def cache(self, num_pages: int) -> PagedCache:
        """Return a cache in which nothing is a number."""
        (_, num_kv, size), dtype = self.keys[0].shape, self.keys[0].dtype
        if self.has_latents:
            value_size = self.values[0].shape[2]
            sizes = value_size, size - value_size
            cache: PagedCache = LatentCache(1, (num_pages, NATIVE_PAGE_SIZE), *sizes, dtype, CPU)
        else:
            cache = NativeCache(1, num_pages, num_kv, size, dtype)
        for cached in (cache.keys[0], cache.values[0]):
            cached.fill_(torch.nan)
        return cache

    def run(
        self, steps: list[Step], kernel: str | None = None, *, threads: int = 1, pages_seed: int = 0
    ) -> list[torch.Tensor]:
        """Store and attend step by step; returns the outputs [L, Q, V] of each sequence."""
        counts = [-(-length // NATIVE_PAGE_SIZE) for length in self.lengths]
        free = list(range(sum(counts) + 2))
        random.Random(pages_seed).shuffle(free)
        slots = [slots_of([free.pop() for _ in range(c)]) for c in counts]
        cache, attention = self.cache(sum(counts) + 2), NativeAttention(self.window, kernel)
        done = [0] * len(counts)
        outputs: list[list[torch.Tensor]] = [[] for _ in counts]
        for step in steps:
            spans, rows = [], []
            for b, count in step:
                begin, end = done[b], done[b] + count
                spans.append(Span(slots[b][:end], begin))
                parts = (self.queries[b], self.keys[b], self.values[b])
                rows.append(torch.cat([part[begin:end].flatten(1) for part in parts], dim=1))
                done[b] = end
            # As the model's: queries, keys and values of a token side by side.
            packed = torch.cat(rows)
            query, key, value = (
                part.unflatten(1, like[0].shape[1:]).transpose(0, 1)
                for part, like in zip(
                    packed.split([p[0][0].numel() for p in self._parts()], dim=1),
                    self._parts(),
                    strict=True,
                )
            )
            new_slots = np.concatenate([span.slots[span.start :] for span in spans])
            cache.store(0, torch.from_numpy(new_slots), key, value)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda: threads)
                view = attention.view(spans, sum(count == 1 for _, count in step))
                output = attention.attend(query.unsqueeze(0), cache, 0, view, self.scoring)[0]
            for (b, _), part in zip(step, output.split([c for _, c in step]), strict=True):
                outputs[b].append(part)
        return [torch.cat(parts) for parts in outputs]

    def _parts(self) -> tuple[list[torch.Tensor], ...]:
        return self.queries, self.keys, self.values

    def exact(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs [L, Q, V] in float64, and how far float32's sums may be off them."""
        query, keys, values = (part[sequence].double() for part in self._parts())
        length, num_q, size = query.shape
        keys, values = (
            part.repeat_interleave(num_q // part.shape[1], dim=1) for part in (keys, values)
        )
        scaling, cap = self.scoring.scaling, self.scoring.softcap
        scores = torch.einsum("tqd,sqd->qts", query, keys) * scaling
        sizes = torch.einsum("tqd,sqd->qts", query.abs(), keys.abs()) * scaling
        off = (size + 4) * SINGLE * sizes
        if cap is not None:
            scores, off = cap * torch.tanh(scores / cap), off + 8 * cap * SINGLE
        at = torch.arange(length)
        hidden = at[None] > at[:, None]
        if self.window is not None:
            hidden |= at[None] <= at[:, None] - self.window
        scores, off = scores.masked_fill(hidden, -torch.inf), off.masked_fill(hidden, 0)
        if self.scoring.sinks is not None:
            sinks = self.scoring.sinks.double().view(-1, 1, 1).expand(-1, length, 1)
            scores = torch.cat((scores, sinks), dim=-1)
        shares = scores.softmax(-1)[..., :length]
        output = torch.einsum("qts,sqd->tqd", shares, values)
        # The subtraction of the largest score loses bits of both; exponentials lose a few more.
        finite = scores.masked_fill(scores == -torch.inf, 0).abs().amax(-1)
        error = (2 * off.amax(-1) + (length + 40 + 4 * finite) * SINGLE).t().unsqueeze(-1)
        bound = error * torch.einsum("qts,sqd->tqd", shares, values.abs())
        dtype = self.queries[sequence].dtype
        smallest = 2.0**-24 if dtype == torch.float16 else 1e-30
        return output, 1.01 * bound + 1.01 * ROUNDING[dtype] * output.abs() + smallest


def slots_of(pages: list[int]) -> np.ndarray:
    first = np.array(pages, dtype=np.int64)[:, None] * NATIVE_PAGE_SIZE
    slots: np.ndarray = (first + np.arange(NATIVE_PAGE_SIZE)).reshape(-1)
    return slots


def make(
    seed: int,
    *,
    lengths: list[int],
    dtype: torch.dtype,
    num_kv: int = 2,
    heads: int = 4,
    size: int = 64,
    value_size: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    spread: float = 1.0,
) -> Case:
    """Return random sequences; with a ``value_size`` keys are latents."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return (spread * torch.randn(shape, generator=generator)).to(dtype)

    if value_size is not None:
        num_kv = 1
    keys = [randn(length, num_kv, size) for length in lengths]
    values = [
        randn(length, num_kv, size) if value_size is None else key[..., :value_size]
        for length, key in zip(lengths, keys, strict=True)
    ]
    queries = [randn(length, num_kv * heads, size) for length in lengths]
    sinks = randn(num_kv * heads) if has_sinks else None
    scoring = Scoring(size**-0.5, softcap, sinks, window is not None)
    return Case(queries, keys, values, window, scoring, value_size is not None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.sampled_from([1, 2, 7, 8, 16, 31, 32, 40, 64, 80, 96, 128]))
    has_latents = draw(st.integers(0, 4)) == 0
    return make(
        draw(st.integers(0, 10_000)),
        lengths=draw(st.lists(st.integers(1, 70), min_size=1, max_size=4)),
        dtype=draw(st.sampled_from(DTYPES)),
        num_kv=draw(st.integers(1, 3)),
        heads=draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 26, 33])),
        size=size,
        value_size=draw(st.integers(1, size)) if has_latents else None,
        window=draw(st.one_of(st.none(), st.integers(1, 40))),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        has_sinks=draw(st.booleans()),
        spread=draw(st.sampled_from([0.01, 1.0, 3.0])),
    )


def one_prefill(case: Case) -> list[Step]:
    """Return one step with all tokens of all sequences."""
    return [list(enumerate(case.lengths))]


def one_by_one(case: Case) -> list[Step]:
    """Return a step for each token of each sequence, none in company."""
    return [[(b, 1)] for b, length in enumerate(case.lengths) for _ in range(length)]


def crowded(case: Case, source: random.Random) -> list[Step]:
    """Return steps of decodes and chunks in random company."""

    def steps() -> Iterator[Step]:
        left = case.lengths
        while any(left):
            waiting = [b for b, count in enumerate(left) if count]
            chosen = source.sample(waiting, source.randint(1, len(waiting)))
            step = [(b, 1 if source.random() < 0.3 else source.randint(1, left[b])) for b in chosen]
            for b, count in step:
                left[b] -= count
            yield step

    return list(steps())


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(
        not a.isnan().any() and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
