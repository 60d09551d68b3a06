"""Attention on an accelerator that reads the cache's pages in place.

torch's variable-length attention (FlashAttention, Dao 2023) takes a table of each sequence's pages.
It takes only half precision, and head sizes that are multiples of 8 up to 256. It neither caps
scores nor knows sinks, and needs values of the keys' size.

Dimension letters: T packed tokens, B sequences of a call, M pages of the longest of them, Q query
heads, G key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.device import CPU, has_broken, lacks_memory
from cluster.errors import first_line
from router.model.attention.interface import Attention, Scoring, Span
from router.model.attention.paged import GatheredAttention
from router.model.kv_cache import PagedCache
from router.model.staged_batch import with_tensors

try:
    from torch.nn.attention import varlen
except ImportError:  # an old torch; pages without FlashAttention 3 come with torch 2.13
    varlen = None  # type: ignore[assignment]

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE, HEAD_STEP = 256, 8
# Values of a trial are of unit variance; half precision has seven bits at least.
_TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Part:
    """The sequences of one call: packed tokens ``begin:end``.

    ``query_ends`` [B + 1] are the cumulative numbers of the sequences' tokens, from 0 on, and
    ``key_ends`` [B + 1] those of the cached tokens that they attend to. ``lengths`` [B] are these
    tokens of each, and ``block_table`` [B, M] its pages, padded by page 0. All are int32.
    ``max_tokens`` and ``max_length`` are the largest numbers.
    """

    begin: int
    end: int
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    max_tokens: int
    max_length: int


@dataclass(frozen=True, slots=True)
class VarlenView:
    """The calls of one packed step: decodes, then prefill chunks."""

    parts: tuple[Part, ...]


class VarlenAttention:
    """See :class:`router.model.attention.interface.Attention`.

    Decodes and chunks are attended by calls of their own, and no sequence's keys are split: so the
    order of a token's sums is the same in any company.
    """

    name = "varlen"
    page_size = 256
    """FlashAttention 2, which torch brings, takes multiples of it; its successors take any."""
    is_independent = False

    def __init__(self, sliding_window: int | None) -> None:
        """``sliding_window`` is that of the layers with a window, in tokens."""
        self._window = sliding_window

    def view(self, spans: Sequence[Span], num_decode: int) -> VarlenView:
        """Return the step's tables."""
        halves = (spans[:num_decode], 0), (spans[num_decode:], num_decode)
        return VarlenView(tuple(self._part(some, begin) for some, begin in halves if some))

    def _part(self, spans: Sequence[Span], begin: int) -> Part:
        counts = [len(span.slots) - span.start for span in spans]
        lengths = [len(span.slots) for span in spans]
        longest = max(lengths)
        table = np.zeros((len(spans), -(-longest // self.page_size)), dtype=np.int32)
        for row, span in zip(table, spans, strict=True):
            pages = span.slots[:: self.page_size] // self.page_size
            row[: len(pages)] = pages
        ends, key_ends = (
            torch.tensor(list(itertools.accumulate(numbers, initial=0)), dtype=torch.int32)
            for numbers in (counts, lengths)
        )
        return Part(
            begin,
            begin + sum(counts),
            ends,
            key_ends,
            torch.tensor(lengths, dtype=torch.int32),
            torch.from_numpy(table),
            max(counts),
            longest,
        )

    def attend(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        layer_id: int,
        view: VarlenView,
        scoring: Scoring,
    ) -> torch.Tensor:
        """See :class:`router.model.attention.interface.Attention`."""
        tokens = query[0].transpose(0, 1)  # [T, Q, D]
        # A token sees so many keys before its own.
        before = self._window - 1 if scoring.has_window and self._window is not None else -1
        outputs: list[Any] = [
            varlen.varlen_attn(
                tokens[part.begin : part.end],
                cache.keys[layer_id],
                cache.values[layer_id],
                part.query_ends,
                part.key_ends,  # FlashAttention 2 refuses a page table without them
                part.max_tokens,
                part.max_length,
                scale=scoring.scaling,
                window_size=(before, 0),
                enable_gqa=True,
                seqused_k=part.lengths,
                block_table=part.block_table,
                num_splits=1,  # with more, a row's sums would depend on its batch mates
            )
            for part in view.parts
        ]
        return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.cat(outputs).unsqueeze(0)


@torch.inference_mode()
def why_not_varlen(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> str:
    """Return why :class:`VarlenAttention` cannot attend on ``device``; empty where it can.

    ``heads`` are the numbers of query heads and of key/value heads. Where dtype and sizes allow it,
    it is tried there: against gathered attention, and a sequence alone against the same in company.
    Raises the trial's error where it has broken the device, and ``torch.OutOfMemoryError`` where
    that has no memory for the trial.
    """
    if dtype not in HALF:
        return f"it takes half precision, not {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_SIZE or head_dim % HEAD_STEP:
        return f"it takes heads of multiples of {HEAD_STEP} up to {MAX_HEAD_SIZE}, not {head_dim}"
    if varlen is None:
        return f"torch {torch.__version__} has none"
    try:
        return _tried(device, dtype, heads, head_dim)
    except (RuntimeError, TypeError, ValueError) as error:  # another signature, another device
        if lacks_memory(error) or has_broken(error):
            raise
        return f"torch {torch.__version__} refuses it there ({first_line(error)[:160]})"


_TRIAL_WINDOW = 8
"""So few keys that one more or less shows."""


def _tried(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> str:
    """Attend decodes and chunks within a page and beyond, with a window and without."""
    size, (num_q, num_kv) = VarlenAttention.page_size, heads
    cache = PagedCache(1, (6, size), num_kv, head_dim, dtype, device)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    cache.keys[0].copy_(randn(6, size, num_kv, head_dim))
    cache.values[0].copy_(randn(6, size, num_kv, head_dim))
    long, longer = (
        np.concatenate([np.arange(page * size, (page + 1) * size) for page in pages])
        for pages in ((2, 0), (5, 1))
    )
    spans = [
        Span(np.arange(3 * size, 3 * size + 9), 8),
        Span(long[: size + 40], size + 39),
        Span(longer, 2 * size - 1),
        Span(np.arange(4 * size, 4 * size + 6), 0),
        Span(long[: size + 5], size),
    ]
    query = randn(1, num_q, sum(len(span.slots) - span.start for span in spans), head_dim)
    varlen = VarlenAttention(_TRIAL_WINDOW)
    gathered = GatheredAttention(_TRIAL_WINDOW, masks_all=True)

    def attended(
        attention: Attention, scoring: Scoring, some: list[Span], begin: int = 0
    ) -> torch.Tensor:
        counts = [len(span.slots) - span.start for span in some]
        view = attention.view(some, counts.count(1))
        view = with_tensors(view, lambda tensor: tensor.to(device))
        tokens = query[:, :, begin : begin + sum(counts)]
        return attention.attend(tokens, cache, 0, view, scoring).to(CPU).float()

    for has_window in (False, True):
        scoring = Scoring(head_dim**-0.5, has_window=has_window)
        together, begin = attended(varlen, scoring, spans), 0
        error = (together - attended(gathered, scoring, spans)).abs().max()
        if not error <= _TOLERANCE:
            return f"its results on {device} are {float(error):.3g} off"
        for span in spans:
            end = begin + len(span.slots) - span.start
            if not torch.equal(attended(varlen, scoring, [span], begin), together[:, begin:end]):
                return f"a sequence's result on {device} depends on others of its step"
            begin = end
    return ""
