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
    cache, batch, has_window = paged.cache, paged.batch, paged.has_window[layer_id]
    cache.store(layer_id, batch.new_slots, key.squeeze(0), value.squeeze(0))
    outputs = []  # [1, T, Q, D] each
    if batch.num_decode:
        mask = batch.decode_window_mask if has_window else batch.decode_mask
        tokens = query[0, :, : batch.num_decode]
        slots = batch.decode_slots
        outputs.append(
            _attend_decodes(tokens, cache, layer_id, slots, mask, scaling, softcap, s_aux)
        )
    for chunk in batch.chunks:
        mask = chunk.window_mask if has_window else chunk.mask
        tokens = query[:, :, chunk.start : chunk.end]  # [1, Q, C, D]
        keys, values = cache.gather(layer_id, chunk.slots.unsqueeze(0))
        outputs.append(_attend_chunk(tokens, keys, values, mask, scaling, softcap, s_aux))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _attend_decodes(
    query: torch.Tensor,
    cache: PagedCache,
    layer_id: int,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to its slots [B, L]; returns [1, B, Q, D]."""
    if softcap is None and sinks is None and query.is_cpu and query.dtype == torch.bfloat16:
        cached = cache.keys[layer_id], cache.values[layer_id]
        if can_attend_cached(query, *cached):
            return attend_cached(query, *cached, slots, mask, scaling)
    keys, values = cache.gather(layer_id, slots)
    return attend_gathered(query, keys, values, mask, scaling, softcap, sinks)


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend a chunk [1, Q, C, D] to keys and values [G, 1, L, D]; returns [1, C, Q, D]."""
    if softcap is not None or sinks is not None:
        return chunk_by_scores(query[0], keys, values, mask, scaling, softcap, sinks)
    output = functional.scaled_dot_product_attention(
        query,
        keys.transpose(0, 1),  # [1, G, L, D]
        values.transpose(0, 1),
        attn_mask=mask,
        scale=scaling,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return output.transpose(1, 2)


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
