"""The paged key/value cache, and a step's slots in it.

The tokens of one engine step are packed into a single row without padding: first the tokens of
decoding sequences, one each, then the prefill chunks. transformers' model runs over that row and
calls :func:`router.model.paged_attention.paged_attention` in every layer. That stores the new keys
and values in their slots, and attends each sequence to its own slots.

Dimension letters: T packed tokens, B decoding sequences, C tokens of a chunk, L cached tokens
attended to, S cache slots, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.native.built import native
from cluster.wire.tensors import to_bytes, to_span


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
class PagedBatch:
    """The cache slots of one packed step.

    ``new_slots`` [T] take each token's key and value. The first ``num_decode`` tokens belong to
    decoding sequences, which attend to ``decode_slots`` [B, L], padded on the right.
    ``decode_mask`` [B, 1, L] is false at the padding. ``decode_window_mask`` is also false outside
    the sliding window, for layers that have a window. A mask of ``None`` hides nothing.
    """

    new_slots: torch.Tensor
    num_decode: int
    decode_slots: torch.Tensor
    decode_mask: torch.Tensor | None
    decode_window_mask: torch.Tensor | None
    chunks: tuple[Chunk, ...]


class PagedCache:
    """Keys and values of all layers, [G, S, D] each.

    Memory is touched only where tokens are stored. Heads come first, the layout that batched
    matrix products over heads need of gathered rows.
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
        # Fresh memory for each layer's rows would cost more, by its page faults, than gathering.
        self._gathered_keys = _Scratch(self.keys[0])
        self._gathered_values = _Scratch(self.values[0])

    @property
    def num_bytes(self) -> int:
        """The bytes of all layers; memory that keys and values share counts once."""
        storages = [tensor.untyped_storage() for tensor in (*self.keys, *self.values)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def store(
        self, layer_id: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a layer's new keys and values [G, T, D] at slots [T]."""
        _store(key, self.keys[layer_id], slots)
        _store(value, self.values[layer_id], slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots [B, L], [G, B, L, D] each and contiguous.

        They last until the next call, for any layer.
        """
        return (
            self._gathered_keys.gather(self.keys[layer_id], slots),
            self._gathered_values.gather(self.values[layer_id], slots),
        )


class LatentCache(PagedCache):
    """Latents and rotary keys of all layers, [1, S, D]; a value is the beginning of its key."""

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
        """Put a layer's new keys at slots; ``value`` is a part of ``key``."""
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
    """Reused memory for gathered rows, as large as the largest gathering so far."""

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
