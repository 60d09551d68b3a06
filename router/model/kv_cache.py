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

from dataclasses import dataclass

import torch

from cluster.native import native
from cluster.wire.tensors import to_bytes, to_span


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
