"""One new token of each of many sequences attending to what the cache has of them.

With AVX-512 native code reads keys and values where they lie, one sequence and key/value head after
the other. Elsewhere, and where a head's values are not like its keys, they are gathered first and
torch computes with them; a cap or sinks have formulas of their own
(:mod:`router.model.capped_attention`).

Dimension letters: B decoding sequences, L cached tokens attended to, S cache slots, G key/value
heads, Q query heads, R of them to a key/value head, D head size.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_span

_MANY = 8
"""From so many decoding sequences on, batched products are faster than torch's own attention."""
_LENGTH_STEP = 16
_IS_WIDE = native is not None and bool(native.is_wide())
"""Whether vectors are wide enough for native attention to be the faster one: with half as wide ones
a single long sequence takes twice as long as by torch."""


def can_attend_cached(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Say whether :func:`attend_cached` takes queries [Q, B, D] and a layer's keys and values."""
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

    ``slots`` [B, L] are what each looks at, ``mask`` [B, 1, L] is false where it does not. Scores
    and sums are float32, rounded once to bfloat16. What a sequence gets does not depend on the
    others, nor on the number of threads. Returns [1, B, Q, D].
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
    """Return of what the lengths that decodes attend to are best multiples.

    oneDNN compiles batched products for every length that it meets, which grows with each step.
    """
    return _LENGTH_STEP if _takes_products(dtype, device) else 1


def _takes_products(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to keys and values [G, B, L, D].

    Query heads of one key/value head as if they were tokens: one product, not one for each.
    Returns [1, B, Q, D].
    """
    num_kv, num_decode, _, size = keys.shape
    decoding = query.view(num_kv, -1, num_decode, size).transpose(1, 2)  # [G, B, Q/G, D]
    if num_decode >= _MANY and _takes_products(query.dtype, query.device):
        output = _attend_bf16(decoding, keys, values, mask, scaling)
    else:
        output = functional.scaled_dot_product_attention(
            decoding, keys, values, attn_mask=mask, scale=scaling
        )
    return output.transpose(0, 1).reshape(1, num_decode, -1, values.shape[-1])


def _attend_bf16(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend queries [G, B, R, D] to keys and values [G, B, L, D] by batched products.

    torch's own attention on a CPU spends its time in arranging each head's keys anew. A product in
    bf16 rounds scores too coarsely for a softmax, so what the rounding lost is computed by a second
    one, whose sum begins with the rounded scores: the two together are good to 16 bits.
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
