"""Attention on a CPU in native code: all tokens of a step in one call, read from the cache's pages.

A token's result depends on its query and on its sequence's keys and values alone: not on the other
tokens of the step, not on the borders of prefill chunks, not on threads. Kernels of one class
(:data:`KERNELS`) give the same bits. Scores and sums are float32, rounded once to the dtype.
``native/attention/attention_products.h`` has the order of sums.

Dimension letters: T packed tokens, B sequences, L cached tokens of each, N pages, P slots of a
page, G key/value heads, Q query heads, D size of a key, V size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_span
from router.model.attention.interface import Scoring, Span
from router.model.cpu.formats import FORMATS
from router.model.kv_cache import LatentCache, PagedCache

KERNELS: tuple[tuple[str, str], ...] = () if native is None else native.attention_kernels()
"""Name and class of each kernel that this processor can run, the fastest first."""

MAX_HEADS = 1 << 16
"""The most heads, and the most values of one (``native/attention/attention.c``)."""
NATIVE_PAGE_SIZE = 16
"""P of native code."""
ROWS, COLUMNS = 0, 1
"""The layouts of values and of keys in a page."""
PREFILL_TOKENS = 64
"""So many tokens are worth waking threads; fewer are those of decodes, whose calls are short."""
LONG_CONTEXT = 256
"""Tokens that attend to so many others on average have the threads of prefills. For shorter prompts
the experts take as long as the router, whose threads would take processors from them."""


@dataclass(frozen=True, slots=True)
class NativeView:
    """The sequences of one packed step.

    ``spans`` [B, 4] are each sequence's first token in the step, its number of tokens there, the
    position of the first, and the place in ``pages`` where its pages begin. ``threads`` compute
    them.
    """

    spans: np.ndarray
    pages: np.ndarray
    threads: int


def takes_heads(num_heads: int, size: int) -> bool:
    """Return whether native attention takes so many heads of so many values."""
    return native is not None and max(num_heads, size) <= MAX_HEADS


class NativeAttention:
    """See :class:`router.model.attention.interface.Attention`."""

    name = "native"
    page_size = NATIVE_PAGE_SIZE
    is_independent = True

    def __init__(
        self, sliding_window: int | None, kernel: str | None = None, prefill_threads: int = 1
    ) -> None:
        """``sliding_window`` is that of the layers with a window, in tokens.

        ``kernel`` is a name of :data:`KERNELS`, or ``None`` for the fastest. ``prefill_threads``
        compute the tokens of long prompts.
        """
        self._window = sliding_window or 0
        self.kernel = kernel
        self._prefill_threads = prefill_threads

    def view(self, spans: Sequence[Span], num_decode: int) -> NativeView:
        """Return the step's sequences; decodes are spans like all others."""
        numbers, pages = [], []
        first = num_pages = attended = 0
        for span in spans:
            length, own = len(span.slots), span.slots[:: self.page_size]
            numbers.append((first, length - span.start, span.start, num_pages))
            pages.append(own)
            first += length - span.start
            num_pages += len(own)
            attended += (length - span.start) * (length + span.start) // 2
        return NativeView(
            np.array(numbers, dtype=np.int64),
            (pages[0] if len(pages) == 1 else np.concatenate(pages)) // self.page_size,
            self._threads_for(first, attended),
        )

    def _threads_for(self, num_tokens: int, attended: int) -> int:
        """Return how many threads compute tokens that attend to so many others together."""
        threads = torch.get_num_threads()
        if num_tokens < PREFILL_TOKENS or attended < LONG_CONTEXT * num_tokens:
            return threads
        return max(threads, self._prefill_threads)

    def numbers_of(self, scoring: Scoring) -> tuple[float, float, int]:
        """Return a layer's scaling, softcap (0 for none) and window (0 for none)."""
        window = self._window if scoring.has_window else 0
        return scoring.scaling, scoring.softcap or 0.0, window

    def attend(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        layer_id: int,
        view: NativeView,
        scoring: Scoring,
    ) -> torch.Tensor:
        """See :class:`router.model.attention.interface.Attention`.

        ``cache`` is a :class:`NativeCache` or a
        :class:`router.model.kv_cache.LatentCache`, of the queries' dtype.
        """
        assert native is not None
        keys, values = cache.keys[layer_id], cache.values[layer_id]
        if query.dtype != keys.dtype:
            raise ValueError(f"queries are {query.dtype}, keys are {keys.dtype}")
        if query.stride(3) != 1:
            query = query.contiguous()
        _, num_q, num_tokens, size = query.shape
        _, head_stride, token_stride, _ = query.stride()
        has_latents = isinstance(cache, LatentCache)
        num_kv = 1 if has_latents else values.shape[1]
        value_size = values.shape[-1]
        output = query.new_empty(1, num_tokens, num_q, value_size)
        sinks = scoring.sinks
        native.attend(
            to_span(query),
            to_bytes(keys),
            None if has_latents else to_bytes(values),
            view.spans,
            view.pages,
            to_bytes(output),
            (
                FORMATS[keys.dtype],
                num_tokens,
                len(keys),
                num_kv,
                num_q,
                size,
                value_size,
                token_stride,
                head_stride,
            ),
            self.numbers_of(scoring),
            None if sinks is None else to_bytes(sinks.float()),
            view.threads,
            self.kernel,
        )
        return output


class NativeCache(PagedCache):
    """Keys and values as native attention reads them (``native/attention/attention.h``).

    A page's values are [G, P, V] and its keys are in columns, so that a vector holds the same value
    of several tokens: [G, D, P], or in bfloat16 [G, D / 2, P, 2] with D rounded up to an even
    number.
    """

    def __init__(
        self, num_layers: int, num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """Allocate ``2 * num_layers`` tensors of ``num_pages`` pages on the CPU."""
        self._head_dim = head_dim
        columns: tuple[int, ...] = (head_dim, NATIVE_PAGE_SIZE)
        if dtype == torch.bfloat16:
            columns = ((head_dim + 1) // 2, NATIVE_PAGE_SIZE, 2)
        keys, values = columns, (NATIVE_PAGE_SIZE, head_dim)
        self.keys, self.values = (
            [torch.empty(num_pages, num_kv_heads, *s, dtype=dtype) for _ in range(num_layers)]
            for s in (keys, values)
        )

    def store(
        self, layer_id: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a layer's new keys and values [G, T, D] at slots [T]; see :class:`PagedCache`.

        Raises ``ValueError`` for another dtype or shape, and for a slot beyond the cache.
        """
        _store_natively(key, self.keys[layer_id], slots, self._head_dim, COLUMNS)
        _store_natively(value, self.values[layer_id], slots, self._head_dim, ROWS)

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots [B, L]; see :meth:`PagedCache.gather`."""
        pages, places = slots // NATIVE_PAGE_SIZE, slots % NATIVE_PAGE_SIZE
        keys = self.keys[layer_id].transpose(2, 3)[pages, :, places]  # [B, L, G, D] or pairs
        values = self.values[layer_id][pages, :, places]
        keys = keys.flatten(3)[..., : self._head_dim]
        return keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)


def _store_natively(
    rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor, size: int, layout: int
) -> None:
    """Put rows [G, T, D] into pages of a native layout at slots [T]."""
    assert native is not None
    num_pages, num_kv_heads = cached.shape[:2]
    if rows.shape != (num_kv_heads, len(slots), size) or rows.dtype != cached.dtype:
        raise ValueError(f"{rows.dtype} {tuple(rows.shape)} does not fit the cache")
    if not len(slots):
        return
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    head_stride, token_stride, _ = rows.stride()
    sizes = FORMATS[rows.dtype], layout, num_pages, num_kv_heads, size, token_stride, head_stride
    native.store(to_span(rows), to_bytes(cached), to_bytes(slots), sizes)
