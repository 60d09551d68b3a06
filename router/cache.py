"""The paged key/value cache, and the attention that reads and writes it.

The tokens of one engine step are packed into a single row without padding: first the tokens of
decoding sequences, one each, then the prefill chunks. transformers' model runs over that row and
calls :func:`paged_attention` in every layer, which stores the new keys and values in their slots
and attends each sequence to its own.

Dimension letters: T packed tokens, B decoding sequences, C tokens of a chunk, L cached tokens
attended to, S cache slots, G key/value heads, Q query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

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
    [C, L] is true where a token may look, or ``None`` when plain causal attention says the same.
    """

    start: int
    end: int
    slots: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one packed step live in the cache.

    ``new_slots`` [T] is where each token's key and value go. The first ``num_decode`` tokens
    belong to decoding sequences: ``decode_slots`` [B, L] are the slots that they attend to, right
    padded, and ``decode_mask`` [B, 1, 1, L] is false at the padding and outside the window, or
    ``None`` where nothing is hidden.
    """

    new_slots: torch.Tensor
    num_decode: int
    decode_slots: torch.Tensor
    decode_mask: torch.Tensor | None
    chunks: tuple[Chunk, ...]


class PagedCache:
    """Keys and values of all layers, [S, G, D] each; memory is touched only where tokens are."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``2 * num_layers`` tensors of [num_slots, num_kv_heads, head_dim]."""
        shape = (num_slots, num_kv_heads, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        # Fresh memory for every layer's gathered rows costs more, page by page, than gathering.
        self._gathered_keys = _Scratch(self.keys[0])
        self._gathered_values = _Scratch(self.values[0])

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots [B, L], [B, G, L, D] each.

        They last until the next call, for whatever layer.
        """
        return (
            self._gathered_keys.gather(self.keys[layer_id], slots),
            self._gathered_values.gather(self.values[layer_id], slots),
        )


class _Scratch:
    """Memory for gathered rows, as much as the largest gathering needed."""

    def __init__(self, like: torch.Tensor) -> None:
        self._rows = like.new_empty((0, *like.shape[1:]))

    def gather(self, cached: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return cached rows [S, G, D] at slots [B, L] as [B, G, L, D]."""
        count = slots.numel()
        if self._rows.shape[0] < count:
            self._rows = cached.new_empty((count, *cached.shape[1:]))
        rows = self._rows[:count]
        torch.index_select(cached, 0, slots.view(-1), out=rows)
        return rows.view(*slots.shape, *cached.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class PagedContext:
    """What travels through transformers' model to :func:`paged_attention`."""

    cache: PagedCache
    batch: PagedBatch


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: PagedContext,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend packed tokens to their sequences' cached keys and values.

    An attention implementation in the sense of transformers' registry. ``query`` is [1, Q, T, D],
    ``key`` and ``value`` [1, G, T, D]; ``paged`` comes from the model's caller. Returns
    [1, T, Q, D]. Masks are in ``paged``; sliding windows are part of them.
    """
    layer_id: int = module.layer_idx  # type: ignore[assignment]
    keys = paged.cache.keys[layer_id]
    values = paged.cache.values[layer_id]
    batch = paged.batch
    keys.index_copy_(0, batch.new_slots, key.squeeze(0).transpose(0, 1))
    values.index_copy_(0, batch.new_slots, value.squeeze(0).transpose(0, 1))
    outputs = []  # [1, T, Q, D] each
    if batch.num_decode:
        num_kv = keys.shape[1]
        decoding = query[0, :, : batch.num_decode].transpose(0, 1)  # [B, Q, D]
        # Query heads of one key/value head as if they were tokens: one product, not one for each.
        output = _attend(
            decoding.reshape(batch.num_decode, num_kv, -1, decoding.shape[2]),  # [B, G, Q/G, D]
            *paged.cache.gather(layer_id, batch.decode_slots),
            batch.decode_mask,
            scaling,
            is_causal=False,
        )
        outputs.append(output.reshape(1, batch.num_decode, -1, decoding.shape[2]))
    for chunk in batch.chunks:
        output = _attend(
            query[:, :, chunk.start : chunk.end],  # [1, Q, C, D]
            *paged.cache.gather(layer_id, chunk.slots.unsqueeze(0)),
            chunk.mask,
            scaling,
            is_causal=chunk.mask is None,
        )
        outputs.append(output.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scaling,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
