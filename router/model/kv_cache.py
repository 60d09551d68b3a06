"""The paged key/value cache, and the attention that reads and writes it.

The tokens of one engine step are packed into a single row without padding: first the tokens of
decoding sequences, one each, then the prefill chunks. transformers' model runs over that row and
calls :func:`paged_attention` in every layer, which stores the new keys and values in their slots
and attends each sequence to its own.

Dimension letters: T packed tokens, B decoding sequences, C tokens of a chunk, L cached tokens
attended to, S cache slots, G key/value heads, Q query heads, R of them to a key/value head, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_span
from router.model.capped_attention import chunk_by_scores, decode_by_scores
from router.model.cpu.decode_attention import attend_cached, attend_gathered, can_attend_cached

ATTENTION_NAME = "expertmesh_paged"
PAGE_SIZE = 16


class PagePool:
    """Hands out pages of ``PAGE_SIZE`` token slots; a sequence's pages need not be adjacent."""

    def __init__(self, num_pages: int) -> None:
        """All pages are free at first."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages; the caller has checked ``num_free``."""
        if count > len(self._free):
            raise IndexError(f"{count} pages asked for, {len(self._free)} free")
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages to the pool."""
        self._free.extend(reversed(pages))


def pages_needed(num_tokens: int) -> int:
    """Return how many pages hold ``num_tokens`` tokens."""
    return -(-num_tokens // PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill chunk in the packed row: tokens ``start:end``, and the slots it attends to.

    ``slots`` [L] are the sequence's slots up to and including the chunk's last token; ``mask``
    [C, L] is true where a token may look, or ``None`` when plain causal attention says the same;
    ``windowed`` is the same for layers with a sliding window.
    """

    start: int
    end: int
    slots: torch.Tensor
    mask: torch.Tensor | None
    windowed: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one packed step live in the cache.

    ``new_slots`` [T] is where each token's key and value go. The first ``num_decode`` tokens
    belong to decoding sequences: ``decode_slots`` [B, L] are the slots that they attend to, right
    padded, and ``decode_mask`` [B, 1, L] is false at the padding, or ``None`` where nothing is
    hidden; ``decode_windowed`` is also false outside the sliding window of layers that have one.
    """

    new_slots: torch.Tensor
    num_decode: int
    decode_slots: torch.Tensor
    decode_mask: torch.Tensor | None
    decode_windowed: torch.Tensor | None
    chunks: tuple[Chunk, ...]


class PagedCache:
    """Keys and values of all layers, [G, S, D] each; memory is touched only where tokens are.

    Heads come first, so that what is gathered of them lies as products of many heads want it.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``2 * num_layers`` tensors of [num_kv_heads, num_slots, head_dim]."""
        shape = (num_kv_heads, num_slots, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        # Fresh memory for every layer's gathered rows costs more, page by page, than gathering.
        self._gathered_keys = _Scratch(self.keys[0])
        self._gathered_values = _Scratch(self.values[0])

    def store(
        self, layer_id: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a layer's new keys and values [G, T, D] at slots [T]."""
        _store(key, self.keys[layer_id], slots)
        _store(value, self.values[layer_id], slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots [B, L], [G, B, L, D] each and contiguous.

        They last until the next call, for whatever layer.
        """
        return (
            self._gathered_keys.gather(self.keys[layer_id], slots),
            self._gathered_values.gather(self.values[layer_id], slots),
        )


class LatentCache(PagedCache):
    """Latents of all layers and their rotary keys, [1, S, D]; values are the beginning of a key."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        latent_size: int,
        rotary_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``num_layers`` tensors of [1, num_slots, latent_size + rotary_size]."""
        shape = (1, num_slots, latent_size + rotary_size)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [key[..., :latent_size] for key in self.keys]
        self._latent_size = latent_size
        self._gathered_keys = _Scratch(self.keys[0])

    def store(
        self, layer_id: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a layer's new keys at slots; ``value`` is part of them."""
        _store(key, self.keys[layer_id], slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots; see :meth:`PagedCache.gather`."""
        keys = self._gathered_keys.gather(self.keys[layer_id], slots)
        return keys, keys[..., : self._latent_size]


def _store(rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor) -> None:
    """Put rows [G, T, D] into [G, S, D] at slots [T]."""
    num_heads, num_slots, size = cached.shape
    is_plain = rows.is_cpu and rows.stride(2) == 1 and rows.dtype == cached.dtype
    fits = rows.shape == (num_heads, len(slots), size) and len(slots) > 0
    if native is None or not is_plain or not fits:
        cached.index_copy_(1, slots, rows)
        return
    value_bytes = rows.itemsize
    between_heads, between_tokens, _ = rows.stride()
    sizes = (
        num_heads,
        num_slots,
        size * value_bytes,
        between_tokens * value_bytes,
        between_heads * value_bytes,
    )
    native.store(to_span(rows), to_bytes(cached), to_bytes(slots), sizes)


class _Scratch:
    """Memory for gathered rows, as much as the largest gathering needed."""

    def __init__(self, like: torch.Tensor) -> None:
        self._memory = like.new_empty(0)

    def gather(self, cached: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return cached rows [G, S, D] at slots [B, L] as [G, B, L, D]."""
        num_heads, _, size = cached.shape
        count = num_heads * slots.numel() * size
        if len(self._memory) < count:
            self._memory = cached.new_empty(count)
        rows = self._memory[:count].view(num_heads, -1, size)
        torch.index_select(cached, 1, slots.view(-1), out=rows)
        return rows.view(num_heads, *slots.shape, size)


@dataclass(frozen=True, slots=True)
class PagedContext:
    """What travels through transformers' model to :func:`paged_attention`.

    ``windowed`` tells of each layer whether it has a sliding window.
    """

    cache: PagedCache
    batch: PagedBatch
    windowed: Sequence[bool]


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

    An attention implementation in the sense of transformers' registry. ``query`` is [1, Q, T, D],
    ``key`` and ``value`` [1, G, T, D]; ``paged`` comes from the model's caller. Returns
    [1, T, Q, D], where D is that of the values. Masks are in ``paged``; sliding windows are part of
    them. ``s_aux`` [Q] are the heads' sinks, ``softcap`` caps scores
    (:mod:`router.model.capped_attention`).
    """
    layer_id: int = module.layer_idx  # type: ignore[assignment]
    batch, windowed = paged.batch, paged.windowed[layer_id]
    paged.cache.store(layer_id, batch.new_slots, key.squeeze(0), value.squeeze(0))
    is_plain = s_aux is None and softcap is None
    outputs = []  # [1, T, Q, D] each
    if batch.num_decode:
        cached = paged.cache.keys[layer_id], paged.cache.values[layer_id]
        mask = batch.decode_windowed if windowed else batch.decode_mask
        decoding = query[0, :, : batch.num_decode]
        if is_plain and can_attend_cached(decoding, *cached):
            outputs.append(attend_cached(decoding, *cached, batch.decode_slots, mask, scaling))
        else:
            gathered = paged.cache.gather(layer_id, batch.decode_slots)
            outputs.append(
                attend_gathered(decoding, *gathered, mask, scaling)
                if is_plain
                else decode_by_scores(decoding, *gathered, mask, scaling, softcap, s_aux)
            )
    for chunk in batch.chunks:
        keys, values = paged.cache.gather(layer_id, chunk.slots.unsqueeze(0))
        mask = chunk.windowed if windowed else chunk.mask
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
