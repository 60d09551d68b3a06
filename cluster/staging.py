"""Copies between a process's device and its host: one for many tensors, each way.

The tensors of one copy lie one after the other in a buffer, by the size of their values, the
largest first, so that each begins where its dtype allows. Buffers are reused: the tensors of a copy
last until the next one in the same direction. Host buffers are pinned, for an accelerator's fast
copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_BYTES = torch.uint8


class Staging:
    """The copies of one thread that computes on a device."""

    def __init__(self, device: torch.device) -> None:
        """Copy from and to ``device``, an accelerator."""
        self.device = device
        self._from_device = _Pinned()
        self._to_device = _Pinned()

    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the device on the host, by one copy; waits for their values."""
        order = _by_value_size(tensors)
        flat = [tensors[i].contiguous().view(-1).view(_BYTES) for i in order]
        packed = flat[0] if len(flat) == 1 else torch.cat(flat)
        host = self._from_device.of(len(packed))
        host.copy_(packed)
        return _views(host, tensors, order)

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the host on the device, by one copy."""
        order = _by_value_size(tensors)
        host = self._to_device.of(sum(tensor.nbytes for tensor in tensors))
        for place, i in zip(_places(tensors, order), order, strict=True):
            host[place].copy_(tensors[i].contiguous().view(-1).view(_BYTES))
        # The next copy in this direction waits, by its layer's copy to the host, for this one.
        return _views(host.to(self.device, non_blocking=True), tensors, order)


class _Pinned:
    """Reused pinned memory of the host, as large as the largest copy so far."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=_BYTES)

    def of(self, num_bytes: int) -> torch.Tensor:
        """Return the first bytes of the memory."""
        if len(self._memory) < num_bytes:
            size = 1 << max(16, math.ceil(math.log2(num_bytes)))
            self._memory = torch.empty(size, dtype=_BYTES, pin_memory=True)
        return self._memory[:num_bytes]


def _by_value_size(tensors: Sequence[torch.Tensor]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)


def _places(tensors: Sequence[torch.Tensor], order: Sequence[int]) -> list[slice]:
    """Return where each tensor's bytes are, in ``order``."""
    places, begin = [], 0
    for i in order:
        places.append(slice(begin, begin + tensors[i].nbytes))
        begin += tensors[i].nbytes
    return places


def _views(
    packed: torch.Tensor, like: Sequence[torch.Tensor], order: Sequence[int]
) -> list[torch.Tensor]:
    """Return the tensors in packed bytes, in the order of ``like``."""
    views: list[torch.Tensor] = [packed] * len(like)
    for place, i in zip(_places(like, order), order, strict=True):
        views[i] = packed[place].view(like[i].dtype).view(like[i].shape)
    return views
