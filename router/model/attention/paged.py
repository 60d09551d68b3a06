"""Attention over the paged cache, as transformers calls it.

Keys and values of a step's sequences are gathered from the cache, and torch attends: on any device,
for any scoring. Where scores are capped or heads have sinks, :mod:`router.model.attention.capped`
attends. :mod:`router.model.attention_choice` chooses a faster implementation where there is one.

Dimension letters: T packed tokens, B decoding sequences, C tokens of a chunk, L cached tokens
attended to, G key/value heads, Q query heads, R = Q / G, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from router.model.attention.capped import attend_by_scores, chunk_by_scores
from router.model.attention.interface import Attention, PagedBatch, Scoring, Span
from router.model.kv_cache import PagedCache

ATTENTION_NAME = "expertmesh_paged"


@dataclass(slots=True, eq=False)
class PagedContext:
    """The argument that transformers' model passes on to :func:`paged_attention`.

    ``has_window`` is true for each layer with a sliding window. ``room`` is memory that the native
    layers of a piece share (:class:`router.model.cpu.native_layer.AttentionWorkspace`).
    """

    cache: PagedCache
    attention: Attention
    batch: PagedBatch
    has_window: Sequence[bool]
    room: Any = None


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
    """Store packed tokens' keys and values, and attend each to those of its sequence.

    An attention implementation for transformers' registry. ``query`` is [1, Q, T, D], ``key`` and
    ``value`` are [1, G, T, D]. ``paged`` comes from the model's caller and knows what each token
    sees. ``s_aux`` [Q] are the heads' sinks; ``softcap`` caps scores. Returns [1, T, Q, D] with the
    D of the values.
    """
    layer_id: int = module.layer_idx  # type: ignore[assignment]
    cache, batch = paged.cache, paged.batch
    cache.store(layer_id, batch.new_slots, key.squeeze(0), value.squeeze(0))
    scoring = Scoring(scaling, softcap, s_aux, paged.has_window[layer_id])
    return paged.attention.attend(query, cache, layer_id, batch.view, scoring), None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill chunk: tokens ``start:end`` of the packed row, and the slots that they attend to.

    ``slots`` [L] are the sequence's slots up to and including the chunk's last token. ``mask``
    [C, L] is true where a token attends, or ``None`` for plain causal attention. ``window_mask``
    is the mask of layers with a sliding window.
    """

    start: int
    end: int
    slots: torch.Tensor
    mask: torch.Tensor | None
    window_mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class GatheredView:
    """The slots and masks of one packed step.

    The first ``num_decode`` tokens belong to decoding sequences, which attend to ``decode_slots``
    [B, L], padded on the right. ``decode_mask`` [B, 1, L] is false at the padding.
    ``decode_window_mask`` is also false outside the sliding window, for layers that have a window.
    A mask of ``None`` hides nothing.
    """

    num_decode: int
    decode_slots: torch.Tensor
    decode_mask: torch.Tensor | None
    decode_window_mask: torch.Tensor | None
    chunks: tuple[Chunk, ...]


class GatheredAttention:
    """See :class:`router.model.attention.interface.Attention`; the oracle of the others."""

    name = "gathered"
    page_size = 16
    is_independent = False

    def __init__(self, sliding_window: int | None, *, masks_all: bool = False) -> None:
        """``sliding_window`` is that of the layers with a window, in tokens.

        With ``masks_all``, decodes have a mask also where it hides nothing. A device may have
        another kernel without a mask, and a row's result must not depend on the lengths of the
        others.
        """
        self._window = sliding_window
        self._masks_all = masks_all

    def view(self, spans: Sequence[Span], num_decode: int) -> GatheredView:
        """Return the step's slots and masks."""
        decodes, prefills = spans[:num_decode], spans[num_decode:]
        slots, mask, window_mask = self._decode_part([span.slots for span in decodes])
        ends = itertools.accumulate((len(s.slots) - s.start for s in prefills), initial=num_decode)
        chunks = tuple(map(self._chunk, prefills, ends))
        return GatheredView(num_decode, slots, mask, window_mask, chunks)

    def _decode_part(
        self, slots: list[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return slots [B, L], the mask of all sequences, and the mask within the sliding window.

        Masks are [B, 1, L]; ``None`` hides nothing.
        """
        if not slots:
            return torch.empty((0, 0), dtype=torch.int64), None, None
        lengths = np.array([len(s) for s in slots]).reshape(-1, 1)
        longest = int(lengths.max())
        exceeds_window = self._window is not None and longest > self._window
        is_even = longest == lengths.min() and not self._masks_all
        if not exceeds_window and is_even:
            return torch.from_numpy(np.stack(slots)), None, None
        column = np.arange(longest).reshape(1, -1)
        mask = column < lengths
        # Padding repeats the sequence's own first slot, since a masked value must still be finite.
        padded = np.repeat([[s[0]] for s in slots], longest, axis=1)
        padded[mask] = np.concatenate(slots)
        seen = None if is_even else torch.from_numpy(mask)[:, None, :]
        if not exceeds_window:
            return torch.from_numpy(padded), seen, seen
        within = mask & (column >= lengths - self._window)
        return torch.from_numpy(padded), seen, torch.from_numpy(within)[:, None, :]

    def _chunk(self, span: Span, begin: int) -> Chunk:
        length = len(span.slots)
        exceeds_window = self._window is not None and length > self._window
        mask = within = None
        if span.start > 0 or exceeds_window:
            query = np.arange(span.start, length).reshape(-1, 1)
            key = np.arange(length).reshape(1, -1)
            visible = key <= query
            mask = within = torch.from_numpy(visible) if span.start > 0 else None
            if self._window is not None and exceeds_window:
                within = torch.from_numpy(visible & (key > query - self._window))
        slots = torch.from_numpy(span.slots)
        return Chunk(begin, begin + length - span.start, slots, mask, within)

    def attend(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        layer_id: int,
        view: GatheredView,
        scoring: Scoring,
    ) -> torch.Tensor:
        """See :class:`router.model.attention.interface.Attention`."""
        outputs = []  # [1, T, Q, D] each
        if view.num_decode:
            mask = view.decode_window_mask if scoring.has_window else view.decode_mask
            tokens = query[0, :, : view.num_decode]
            keys, values = cache.gather(layer_id, view.decode_slots)
            outputs.append(_attend_decodes(tokens, keys, values, mask, scoring))
        for chunk in view.chunks:
            mask = chunk.window_mask if scoring.has_window else chunk.mask
            tokens = query[:, :, chunk.start : chunk.end]  # [1, Q, C, D]
            keys, values = cache.gather(layer_id, chunk.slots.unsqueeze(0))
            outputs.append(_attend_chunk(tokens, keys, values, mask, scoring))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend a chunk [1, Q, C, D] to keys and values [G, 1, L, D]; returns [1, C, Q, D]."""
    if scoring.softcap is not None or scoring.sinks is not None:
        return chunk_by_scores(query[0], keys, values, mask, scoring)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # [1, G, L, D]
    heads_of_each = query.shape[1] // keys.shape[1]
    if heads_of_each == 1 or query.is_cpu:
        parts = [(query, keys, values)]
    else:
        # On CUDA only FlashAttention takes grouped heads, which takes neither a mask, float32 nor
        # heads above 256; other kernels hold all scores. So each key/value head is attended to by
        # itself, as if each of its query heads had one.
        groups = (query.split(heads_of_each, dim=1), keys.split(1, dim=1), values.split(1, dim=1))
        parts = [
            (heads, key.expand(-1, heads_of_each, -1, -1), value.expand(-1, heads_of_each, -1, -1))
            for heads, key, value in zip(*groups, strict=True)
        ]
    outputs = [
        functional.scaled_dot_product_attention(
            *part,
            attn_mask=mask,
            scale=scoring.scaling,
            is_causal=mask is None,
            enable_gqa=part[0].shape[1] != part[1].shape[1],
        )
        for part in parts
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).transpose(1, 2)


def _attend_decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend one token [Q, B, D] of each sequence to keys and values [G, B, L, D].

    The query heads of one key/value head count as tokens, so that they share one matrix product.
    Returns [1, B, Q, D].
    """
    num_kv, num_decode, _, size = keys.shape
    decoding = query.view(num_kv, -1, num_decode, size).transpose(1, 2)  # [G, B, R, D]
    if scoring.softcap is not None or scoring.sinks is not None:
        output = attend_by_scores(decoding, keys, values, mask, scoring)
    else:
        output = functional.scaled_dot_product_attention(
            decoding, keys, values, attn_mask=mask, scale=scoring.scaling
        )
    return output.transpose(0, 1).reshape(1, num_decode, -1, values.shape[-1])
