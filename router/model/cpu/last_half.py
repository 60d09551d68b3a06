"""The attention half of the last layer, where only some tokens' hidden states are read after it.

All tokens store keys and values. Only the wanted ones have queries that attend, and pass the output
product and the norm. A row's result does not depend on the other rows, so it is that of
:class:`router.model.cpu.native_layer.NativeAttentionHalf`.

Dimension letters: T tokens of a piece, R wanted tokens, H hidden size, Q query heads, G key/value
heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_span
from router.model.attention.paged import PagedContext
from router.model.cpu.native_attention import NativeView
from router.model.cpu.native_layer import NativeAttentionHalf


def attend_wanted(
    half: NativeAttentionHalf,
    residual: torch.Tensor,
    output: torch.Tensor | None,
    rotation: torch.Tensor | tuple[torch.Tensor, ...],
    paged: PagedContext,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Attend as :class:`router.model.decoder.AttentionHalf` does, only for ``wanted`` tokens.

    ``wanted`` int64 [R] are their indices in the piece, ascending. Their rows of ``residual``
    [T, H] become those after attention. Returns the input of their feed-forward half, [R, H].
    """
    assert native is not None
    assert isinstance(rotation, torch.Tensor)
    parts = half.parts_for(paged)
    norm, inputs, head_norms, input_sizes, factors, keys, values = parts[:7]
    key_sizes, value_sizes, heads, scoring, sinks, kernel = parts[7:13]
    output_product, next_norm, output_sizes, epsilon = parts[13:]
    row_format, _, num_pages, num_kv, num_q, size = heads
    view, threads = paged.batch.view, paged.batch.view.threads
    slots = to_bytes(paged.batch.new_slots)
    if output is not None:
        residual += output
    width = num_q * size, num_kv * size, num_kv * size
    projected = residual.new_empty(len(residual), sum(width))
    native.attention_inputs(
        to_bytes(residual),
        norm,
        inputs,
        to_bytes(rotation),
        head_norms,
        to_bytes(projected),
        input_sizes,
        factors,
        threads,
        None,
    )
    _, new_keys, new_values = projected.split(width, dim=1)
    native.store(to_span(new_keys), keys, slots, key_sizes)
    native.store(to_span(new_values), values, slots, value_sizes)
    kept, queries = residual.index_select(0, wanted), projected.index_select(0, wanted)
    normed = torch.empty_like(kept)
    if not len(kept):
        return normed
    attended = residual.new_empty(len(kept), width[0])
    native.attend(
        to_bytes(queries),
        keys,
        values,
        _spans_of(view, wanted.numpy()),
        view.pages,
        to_bytes(attended),
        (row_format, len(kept), num_pages, num_kv, num_q, size, size, sum(width), size),
        scoring,
        sinks,
        threads,
        kernel,
    )
    native.attention_outputs(
        to_bytes(attended),
        output_product,
        to_bytes(kept),
        next_norm,
        to_bytes(kept),
        to_bytes(normed),
        output_sizes,
        epsilon,
        threads,
        None,
    )
    residual.index_copy_(0, wanted, kept)
    return normed


def _spans_of(view: NativeView, wanted: np.ndarray) -> np.ndarray:
    """Return the spans of the wanted tokens of a view, one each."""
    of = np.searchsorted(view.spans[:, 0], wanted, side="right") - 1
    first, _, position, place = view.spans[of].T
    ones = np.ones_like(wanted)
    spans = (np.arange(len(wanted)), ones, position + wanted - first, place)
    return np.ascontiguousarray(np.stack(spans, axis=1))
