"""Attention of decodes in bf16 on a CPU: natively on the cache, or by batched matrix products.

With AVX-512, native code reads keys and values directly in the cache. Elsewhere, and where values
differ from keys in shape, keys and values are gathered first. For many sequences, batched products
then attend faster than torch.

Dimension letters: B decoding sequences, L cached tokens attended to, S cache slots, G key/value
heads, Q query heads, R = Q / G, D head size.
"""

from __future__ import annotations

import torch

from cluster.native.built import native
from cluster.wire.tensors import to_bytes, to_span

MANY = 8
"""From this number of decoding sequences on, batched products are faster than torch's attention."""
_LENGTH_STEP = 16
_IS_WIDE = native is not None and bool(native.is_wide())
"""Whether the processor has AVX-512. With vectors of half the width, native attention takes twice
torch's time for a single long sequence."""


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
    """Attend one token [Q, B, D] of each sequence to the cache's keys and values [G, S, D].

    A sequence attends to its ``slots`` [B, L], except where ``mask`` [B, 1, L] is false. Scores and
    sums are float32, rounded once to bfloat16. A sequence's output depends neither on the other
    sequences nor on the number of threads. Returns [1, B, Q, D].
    """
    assert native is not None
    num_q, num_decode, size = query.shape
    num_kv, num_slots, _ = keys.shape
    between_heads, between_tokens, _ = query.stride()
    output = query.new_empty(1, num_decode, num_q, size)
    native.attend(
        to_span(query),
        to_bytes(keys),
        to_bytes(values),
        to_bytes(slots),
        None if mask is None else to_bytes(mask),
        to_bytes(output),
        (num_decode, num_kv, num_slots, size, num_q, between_tokens, between_heads),
        scaling,
        torch.get_num_threads(),
    )
    return output


def length_step(dtype: torch.dtype, device: torch.device) -> int:
    """Return the number to whose multiples the lengths of decodes are padded.

    oneDNN compiles batched products anew for every length, and a sequence grows with each step.
    """
    return _LENGTH_STEP if device.type == "cpu" and dtype == torch.bfloat16 else 1


def attend_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend queries [G, B, R, D] to keys and values [G, B, L, D]; returns [G, B, R, D].

    torch's own attention on a CPU spends its time rearranging each head's keys. A product in bf16
    rounds scores too coarsely for a softmax. So a second product, whose sum begins with the rounded
    scores, computes the rounding error. Both together are exact to 16 bits.
    """
    rows = query.reshape(-1, *query.shape[2:])  # [G*B, R, D]
    columns = keys.flatten(0, 1).transpose(1, 2)  # [G*B, D, L]
    rounded = torch.bmm(rows, columns)
    scores = rounded.float().add_(torch.baddbmm(rounded, rows, columns, beta=-1)).mul_(scaling)
    scores = scores.view(*query.shape[:3], -1)  # [G, B, R, L]
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    shares = scores.softmax(-1).to(values.dtype).flatten(0, 1)
    output = torch.bmm(shares, values.flatten(0, 1))
    return output.view(*query.shape[:3], values.shape[-1])
