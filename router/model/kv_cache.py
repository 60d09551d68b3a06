"""The paged key/value cache.

Dimension letters: T packed tokens, B sequences, L cached tokens of each, N pages, P slots of a
page, G key/value heads, D head size.
"""

from __future__ import annotations

import torch

from cluster.device import CPU


class PagedCache:
    """Keys and values of all layers, [N, P, G, D] each.

    A slot is a place for one token; slot ``s`` is place ``s % P`` of page ``s // P``. The layout is
    that of :func:`torch.nn.attention.varlen.varlen_attn`. Memory is touched only where tokens are
    stored.
    """

    def __init__(
        self,
        num_layers: int,
        pages: tuple[int, int],
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``2 * num_layers`` tensors of ``pages``: their number and their slots."""
        shape = (*pages, num_kv_heads, head_dim)
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
        """Return a layer's keys and values at slots [B, L], [G, B, L, D] each.

        They last until the next call, for any layer.
        """
        return (
            self._gathered_keys.gather(self.keys[layer_id], slots),
            self._gathered_values.gather(self.values[layer_id], slots),
        )


class LatentCache(PagedCache):
    """Latents and rotary keys of all layers, [N, P, 1, D]; a value is the beginning of its key."""

    def __init__(
        self,
        num_layers: int,
        pages: tuple[int, int],
        latent_size: int,
        rotary_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate ``num_layers`` tensors of ``pages``: their number and their slots."""
        shape = (*pages, 1, latent_size + rotary_size)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [key[..., :latent_size] for key in self.keys]
        self._gathered_keys = _Scratch(self.keys[0])

    def store(
        self, layer_id: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put a layer's new keys at slots; ``value`` is a part of ``key``."""
        _store(key, self.keys[layer_id], slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values at slots; see :meth:`PagedCache.gather`."""
        keys = self._gathered_keys.gather(self.keys[layer_id], slots)
        return keys, keys[..., : self.values[layer_id].shape[-1]]


def _store(rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor) -> None:
    """Put rows [G, T, D] into [N, P, G, D] at slots [T]."""
    cached.flatten(0, 1).index_copy_(0, slots, rows.transpose(0, 1))


class _Scratch:
    """Reused memory for gathered rows, half as large again as the gathering that it grew for."""

    def __init__(self, like: torch.Tensor) -> None:
        self._memory = like.new_empty(0)

    def gather(self, cached: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return cached rows [N, P, G, D] at slots [B, L] as a view [G, B, L, D]."""
        num_heads, size = cached.shape[2:]
        count = slots.numel() * num_heads * size
        if len(self._memory) < count:
            self._grow(cached, count)
        rows = self._memory[:count].view(-1, num_heads, size)
        torch.index_select(cached.flatten(0, 1), 0, slots.view(-1), out=rows)
        return rows.view(*slots.shape, num_heads, size).permute(2, 0, 1, 3)

    def _grow(self, cached: torch.Tensor, count: int) -> None:
        """Make room for ``count`` values and half of it, so that steps rarely need more.

        A device's allocator keeps what it had for each size before, where others of its processes
        cannot use it; so that goes first.
        """
        self._memory = cached.new_empty(0)
        if cached.device != CPU:
            torch.accelerator.empty_cache()
        try:
            self._memory = cached.new_empty(count + count // 2)
        except torch.OutOfMemoryError:
            self._memory = cached.new_empty(count)
