"""Attention on a CPU: decodes in bf16 natively on the cache, or by batched matrix products.

With AVX-512, native code reads keys and values directly in the cache. Elsewhere, and where values
differ from keys in shape, keys and values are gathered first. For many sequences, batched products
then attend faster than torch.

Dimension letters: B decoding sequences, L cached tokens attended to, N pages, P slots of a page, G
key/value heads, Q query heads, R = Q / G, D head size.
"""

from __future__ import annotations

import torch

from cluster.native.built import native
from cluster.wire.tensors import to_bytes, to_span
from router.model.attention import Scoring
from router.model.kv_cache import PagedCache
from router.model.paged_attention import GatheredAttention, attend_gathered

MANY = 8
"""From this number of decoding sequences on, batched products are faster than torch's attention."""
_LENGTH_STEP = 16
_IS_WIDE = native is not None and bool(native.is_wide())
"""Whether the processor has AVX-512. With vectors of half the width, native attention takes twice
torch's time for a single long sequence."""


class NativeAttention(GatheredAttention):
    """The attention of models in bf16; prefill chunks are attended as in its base class."""

    def __init__(self, sliding_window: int | None) -> None:
        """``sliding_window`` is that of the layers with a window, in tokens."""
        # oneDNN compiles batched products anew for every length, and a sequence grows each step.
        super().__init__(sliding_window, _LENGTH_STEP)

    def attend_decodes(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        layer_id: int,
        slots: torch.Tensor,
        mask: torch.Tensor | None,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Attend one token [Q, B, D] of each sequence to its slots [B, L]; returns [1, B, Q, D]."""
        if scoring.softcap is None and scoring.sinks is None:
            cached = cache.keys[layer_id], cache.values[layer_id]
            if can_attend_cached(query, *cached):
                return attend_cached(query, *cached, slots, mask, scoring.scaling)
            if query.shape[1] >= MANY:
                return attend_products(query, *cache.gather(layer_id, slots), mask, scoring.scaling)
        return attend_gathered(query, *cache.gather(layer_id, slots), mask, scoring)


def can_attend_cached(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether :func:`attend_cached` takes these queries [Q, B, D], keys and values."""
    return (
        _IS_WIDE
        and native is not None
        and query.is_cpu
        and query.dtype == keys.dtype == torch.bfloat16
        and query.stride(2) == 1
        and keys.shape == values.shape
        and keys.is_contiguous()
        and values.is_contiguous()
    )


def attend_cached(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to the cache's keys and values [N, P, G, D].

    A sequence attends to its ``slots`` [B, L], except where ``mask`` [B, 1, L] is false. Scores and
    sums are float32, rounded once to bfloat16. A sequence's output depends neither on the other
    sequences nor on the number of threads. Returns [1, B, Q, D].
    """
    assert native is not None
    num_q, num_decode, size = query.shape
    num_pages, page_size, num_kv, _ = keys.shape
    between_heads, between_tokens, _ = query.stride()
    output = query.new_empty(1, num_decode, num_q, size)
    native.attend(
        to_span(query),
        to_bytes(keys),
        to_bytes(values),
        to_bytes(slots),
        None if mask is None else to_bytes(mask),
        to_bytes(output),
        (num_decode, num_kv, num_pages * page_size, size, num_q, between_tokens, between_heads),
        scaling,
        torch.get_num_threads(),
    )
    return output


def attend_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to keys and values [G, B, L, D].

    torch's own attention on a CPU spends its time rearranging each head's keys. A product in bf16
    rounds scores too coarsely for a softmax. So a second product, whose sum begins with the rounded
    scores, computes the rounding error. Both together are exact to 16 bits. Returns [1, B, Q, D].
    """
    num_kv, num_decode, _, size = keys.shape
    decoding = query.view(num_kv, -1, num_decode, size).transpose(1, 2)  # [G, B, R, D]
    rows = decoding.reshape(-1, *decoding.shape[2:])  # [G*B, R, D]
    columns = keys.flatten(0, 1).transpose(1, 2)  # [G*B, D, L]
    rounded = torch.bmm(rows, columns)
    scores = rounded.float().add_(torch.baddbmm(rounded, rows, columns, beta=-1)).mul_(scaling)
    scores = scores.view(*decoding.shape[:3], -1)  # [G, B, R, L]
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    shares = scores.softmax(-1).to(values.dtype).flatten(0, 1)
    output = torch.bmm(shares, values.flatten(0, 1)).view(num_kv, num_decode, -1, values.shape[-1])
    return output.transpose(0, 1).reshape(1, num_decode, -1, values.shape[-1])
