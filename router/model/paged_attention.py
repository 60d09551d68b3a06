"""Attention over the paged cache, as transformers calls it.

Decodes and prefill chunks gather their keys and values from the cache, and torch attends. In bf16
on a CPU, :mod:`router.model.cpu.decode_attention` attends decodes faster. Where scores are capped
or heads have sinks, :mod:`router.model.capped_attention` attends.

Dimension letters: T packed tokens, B decoding sequences, C tokens of a chunk, L cached tokens
attended to, G key/value heads, Q query heads, R = Q / G, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from router.model.capped_attention import attend_by_scores, chunk_by_scores
from router.model.cpu.decode_attention import (
    MANY,
    attend_cached,
    attend_products,
    can_attend_cached,
)
from router.model.kv_cache import PagedBatch, PagedCache

ATTENTION_NAME = "expertmesh_paged"


@dataclass(frozen=True, slots=True)
class PagedContext:
    """The argument that transformers' model passes on to :func:`paged_attention`.

    ``has_window`` is true for each layer with a sliding window.
    """

    cache: PagedCache
    batch: PagedBatch
    has_window: Sequence[bool]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: PagedContext,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend packed tokens to their sequences' cached keys and values.

    An attention implementation for transformers' registry. ``query`` is [1, Q, T, D], ``key`` and
    ``value`` are [1, G, T, D]. ``paged`` comes from the model's caller and has the masks, sliding
    windows included. ``s_aux`` [Q] are the heads' sinks; ``softcap`` caps scores
    (:mod:`router.model.capped_attention`). Returns [1, T, Q, D] with the D of the values.
    """
    layer_id: int = module.layer_idx  # type: ignore[assignment]
    batch, has_window = paged.batch, paged.has_window[layer_id]
    paged.cache.store(layer_id, batch.new_slots, key.squeeze(0), value.squeeze(0))
    is_plain = s_aux is None and softcap is None
    outputs = []  # [1, T, Q, D] each
    if batch.num_decode:
        cached = paged.cache.keys[layer_id], paged.cache.values[layer_id]
        mask = batch.decode_window_mask if has_window else batch.decode_mask
        decoding = query[0, :, : batch.num_decode]
        is_bf16 = query.is_cpu and query.dtype == torch.bfloat16
        if is_plain and is_bf16 and can_attend_cached(decoding, *cached):
            outputs.append(attend_cached(decoding, *cached, batch.decode_slots, mask, scaling))
        else:
            gathered = paged.cache.gather(layer_id, batch.decode_slots)
            outputs.append(attend_gathered(decoding, *gathered, mask, scaling, softcap, s_aux))
    for chunk in batch.chunks:
        keys, values = paged.cache.gather(layer_id, chunk.slots.unsqueeze(0))
        mask = chunk.window_mask if has_window else chunk.mask
        tokens = query[:, :, chunk.start : chunk.end]  # [1, Q, C, D]
        if not is_plain:
            outputs.append(chunk_by_scores(tokens[0], keys, values, mask, scaling, softcap, s_aux))
            continue
        output = functional.scaled_dot_product_attention(
            tokens,
            keys.transpose(0, 1),  # [1, G, L, D]
            values.transpose(0, 1),
            attn_mask=mask,
            scale=scaling,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != keys.shape[0],
        )
        outputs.append(output.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to keys and values [G, B, L, D].

    The query heads of one key/value head count as tokens, so that they share one matrix product.
    ``softcap`` caps scores, ``sinks`` are [Q]. Returns [1, B, Q, D].
    """
    num_kv, num_decode, _, size = keys.shape
    decoding = query.view(num_kv, -1, num_decode, size).transpose(1, 2)  # [G, B, R, D]
    if softcap is not None or sinks is not None:
        per_head = None if sinks is None else sinks.view(num_kv, 1, -1, 1)
        output = attend_by_scores(decoding, keys, values, mask, scaling, softcap, per_head)
    elif num_decode >= MANY and query.is_cpu and query.dtype == torch.bfloat16:
        output = attend_products(decoding, keys, values, mask, scaling)
    else:
        output = functional.scaled_dot_product_attention(
            decoding, keys, values, attn_mask=mask, scale=scaling
        )
    return output.transpose(0, 1).reshape(1, num_decode, -1, values.shape[-1])
