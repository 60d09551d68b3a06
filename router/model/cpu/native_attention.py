"""Attention on a CPU in native code: all tokens of a step in one call, read from the cache's pages.

A token's result depends on its query and on its sequence's keys and values alone: not on the other
tokens of the step, not on the borders of prefill chunks, not on threads. Kernels of one class
(:data:`KERNELS`) give the same bits. Scores and sums are float32, rounded once to the dtype.
``cluster/native/attention_products.h`` has the order of sums.

Dimension letters: T packed tokens, B sequences, G key/value heads, Q query heads, D size of a key,
V size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.native.built import native
from cluster.wire.tensors import to_bytes, to_span
from router.model.attention import Scoring, Span
from router.model.kv_cache import FORMATS, NATIVE_PAGE_SIZE, LatentCache, PagedCache

KERNELS: tuple[tuple[str, str], ...] = () if native is None else native.attention_kernels()
"""Name and class of each kernel that this processor can run, the fastest first."""


@dataclass(frozen=True, slots=True)
class NativeView:
    """The sequences of one packed step.

    ``spans`` [B, 4] are each sequence's first token in the step, its number of tokens there, the
    position of the first, and the place in ``pages`` where its pages begin.
    """

    spans: np.ndarray
    pages: np.ndarray


class NativeAttention:
    """See :class:`router.model.attention.Attention`."""

    page_size = NATIVE_PAGE_SIZE

    def __init__(self, sliding_window: int | None, kernel: str | None = None) -> None:
        """``sliding_window`` is that of the layers with a window, in tokens.

        ``kernel`` is a name of :data:`KERNELS`, or ``None`` for the fastest.
        """
        self._window = sliding_window or 0
        self._kernel = kernel

    def view(self, spans: Sequence[Span], num_decode: int) -> NativeView:
        """Return the step's sequences; decodes are spans like all others."""
        numbers, pages = [], []
        first = num_pages = 0
        for span in spans:
            length, own = len(span.slots), span.slots[:: self.page_size]
            numbers.append((first, length - span.start, span.start, num_pages))
            pages.append(own)
            first += length - span.start
            num_pages += len(own)
        return NativeView(
            np.array(numbers, dtype=np.int64), np.concatenate(pages) // self.page_size
        )

    def attend(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        layer_id: int,
        view: NativeView,
        scoring: Scoring,
    ) -> torch.Tensor:
        """See :class:`router.model.attention.Attention`.

        ``cache`` is a :class:`router.model.kv_cache.NativeCache` or a
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
            (
                scoring.scaling,
                scoring.softcap or 0.0,
                self._window if scoring.has_window else 0,
            ),
            None if sinks is None else to_bytes(sinks.float()),
            torch.get_num_threads(),
            self._kernel,
        )
        return output
