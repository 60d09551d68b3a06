"""Copies between a process's device and its host: one for many tensors, each way.

The tensors of one copy lie one after the other in a buffer, each at a multiple of :data:`ALIGNMENT`
bytes. Host buffers are pinned, so that the device reads and writes them by itself. Their owner
reserves as much as its usual copies take; a larger copy has them grow. They are reused in turn,
:data:`RING` of them each way: the tensors that a copy brings to the host last until the
:data:`RING`-th next copy to the host.

Each direction has a stream of its own. So a copy waits for the values that it copies, and not for
what the device computes meanwhile or afterwards. Events order the streams; the host waits for the
event of a copy to the host alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch

RING = 2
"""The host buffers of one direction."""
ALIGNMENT = 64
"""Where a tensor may begin in a copy, in bytes; ``grouped_mm`` reads rows from multiples of 16."""

_BYTES = torch.uint8


class Staging:
    """The copies of a process that computes on a device; one thread at a time may copy."""

    def __init__(self, device: torch.device) -> None:
        """Copy from and to ``device``, an accelerator."""
        self.device = device
        self._to_host = _Direction(device)
        self._to_device = _Direction(device)
        self._gap = torch.zeros(ALIGNMENT, dtype=_BYTES, device=device)

    def reserve(self, to_host_bytes: int, to_device_bytes: int) -> None:
        """Have memory for copies of so many bytes; to pin memory takes longer than a copy."""
        self._to_host.reserve(to_host_bytes)
        self._to_device.reserve(to_device_bytes)

    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the device on the host, by one copy; waits for their values.

        They last until the :data:`RING`-th next copy to the host.
        """
        if not tensors:
            return []
        places = _places(tensors)
        packed = self._packed(tensors, places)
        buffer, stream = self._to_host.next_buffer(), self._to_host.stream
        host = buffer.bytes_of(len(packed))
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            host.copy_(packed, non_blocking=True)
        buffer.copied.record(stream)
        # ``packed`` lives until then, so its memory goes to no other tensor under the copy.
        buffer.copied.synchronize()
        return _views(host, tensors, places)

    def to_device(self, *given: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of the host on the device, by one copy, without waiting for it.

        A sequence of tensors [P, ...] of one dtype arrives as one tensor: their concatenation.
        What the current stream computes from now on waits for the copy.
        """
        if not given:
            return []
        joined = [t if isinstance(t, torch.Tensor) else _joined(t) for t in given]
        places = _places(joined)
        buffer, stream = self._to_device.next_buffer(), self._to_device.stream
        host = buffer.bytes_of(places[-1].stop)
        for into, tensors in zip(_views(host, joined, places), given, strict=True):
            if isinstance(tensors, torch.Tensor):
                into.copy_(tensors)
            else:
                torch.cat(list(tensors), out=into)
        with stream:
            packed = host.to(self.device, non_blocking=True)
        buffer.copied.record(stream)
        computing = torch.accelerator.current_stream(self.device)
        computing.wait_event(buffer.copied)
        # Its memory is the copies' stream's, which knows nothing of the computation with it.
        packed.record_stream(computing)
        return _views(packed, joined, places)

    def _packed(self, tensors: Sequence[torch.Tensor], places: Sequence[slice]) -> torch.Tensor:
        """Return the bytes of the device's tensors, at their places."""
        pieces: list[torch.Tensor] = []
        end = 0
        for tensor, place in zip(tensors, places, strict=True):
            if place.start > end:
                pieces.append(self._gap[: place.start - end])
            pieces.append(tensor.contiguous().view(-1).view(_BYTES))
            end = place.stop
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Direction:
    """The stream and the host buffers of the copies in one direction."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.Stream(device)
        self._ring = [_Buffer(device) for _ in range(RING)]
        self._buffers = cycle(self._ring)

    def reserve(self, num_bytes: int) -> None:
        """Have so many bytes in each buffer; waits for the copies under way."""
        for buffer in self._ring:
            buffer.copied.synchronize()
            buffer.bytes_of(num_bytes)

    def next_buffer(self) -> _Buffer:
        """Return the buffer whose last copy is the oldest; waits for the end of that copy."""
        buffer = next(self._buffers)
        buffer.copied.synchronize()
        return buffer


class _Buffer:
    """Pinned memory of the host, as large as was reserved, or as its largest copy so far.

    ``copied`` is recorded after each copy from or to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.copied = torch.Event(device)
        self._memory = torch.empty(0, dtype=_BYTES)

    def bytes_of(self, num_bytes: int) -> torch.Tensor:
        """Return the first bytes of the memory; no copy may be under way."""
        if len(self._memory) < num_bytes:
            size = 1 << max(16, math.ceil(math.log2(num_bytes)))
            with torch.inference_mode(False):  # else it could be written only in that mode
                self._memory = torch.empty(size, dtype=_BYTES, pin_memory=True)
        return self._memory[:num_bytes]


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return dtype and shape of a concatenation, as a tensor without memory."""
    first = tensors[0]
    shape = (sum(map(len, tensors)), *first.shape[1:])
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _places(tensors: Sequence[torch.Tensor]) -> list[slice]:
    """Return where each tensor's bytes are in a copy."""
    places, begin = [], 0
    for tensor in tensors:
        places.append(slice(begin, begin + tensor.nbytes))
        begin = -(-places[-1].stop // ALIGNMENT) * ALIGNMENT
    return places


def _views(
    packed: torch.Tensor, like: Sequence[torch.Tensor], places: Sequence[slice]
) -> list[torch.Tensor]:
    """Return the tensors in packed bytes; ``like`` has their dtypes and shapes."""
    return [
        packed[place].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, like, strict=True)
    ]
