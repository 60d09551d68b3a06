"""The emulated device's face in ``torch.accelerator``: memory, streams, events, pinned memory.

A copy with ``non_blocking`` is unfinished until its stream, an event recorded after it, or the
device is synchronised. Until then a host tensor that is copied to has wrong values: NaN, or the
largest integer. A pinned host tensor that is copied from must keep its values, or the
synchronisation raises :class:`HostMemoryError`. So a missing wait, and a ring that is written too
early, fail a test on the host. Streams run nothing beside each other, and events have no times.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Self
from unittest import mock

import torch
from torch.utils import _device

PINNABLE = ("empty", "empty_like", "zeros")
"""The functions of torch that take ``pin_memory`` while a device is emulated."""


class EmulationError(AssertionError):
    """Code broke a rule of the emulated device. No ``except RuntimeError`` hides an assertion."""


class HostMemoryError(EmulationError):
    """Pinned memory was overwritten before a copy from it was waited for."""


class StreamError(EmulationError):
    """A stream computes with a tensor of another stream, whose memory may go to a new tensor."""


_pinned: dict[int, int] = {}
"""Where pinned memory begins and ends; as CUDA does, this knows memory by its address."""


def mark_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a host tensor's memory as pinned until it is freed; returns the tensor."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    _pinned[start] = start + storage.nbytes()
    weakref.finalize(storage, _pinned.pop, start, None).atexit = False
    return tensor


def is_pinned(tensor: torch.Tensor, device: object = None) -> bool:
    """Return whether a tensor lies in pinned memory of the host."""
    if not tensor.is_cpu:
        return False
    address = tensor.data_ptr()
    return any(start <= address < end for start, end in list(_pinned.items()))


class Memory:
    """The device's memory: each storage counts from its first tensor until it is freed."""

    def __init__(self, capacity_bytes: int, streams: Streams) -> None:
        """Begin with ``capacity_bytes`` free."""
        self.capacity_bytes = capacity_bytes
        self._streams = streams
        self.allocated_bytes = 0
        self.peak_bytes = 0
        # A garbage collection in `hold` may free a storage on the same thread.
        self._lock = threading.RLock()

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of an inner tensor, once; raises :class:`torch.OutOfMemoryError`."""
        storage: Any = tensor.untyped_storage()
        held: list[int] | None = getattr(storage, "emulated_bytes", None)
        more = storage.nbytes() - (0 if held is None else held[0])
        if more <= 0:
            return
        with self._lock:
            if self.allocated_bytes + more > self.capacity_bytes:
                raise torch.OutOfMemoryError(
                    f"the emulated device is out of memory: {more} bytes asked for, "
                    f"{self.capacity_bytes - self.allocated_bytes} of {self.capacity_bytes} free"
                )
            self.allocated_bytes += more
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        if held is None:
            held = storage.emulated_bytes = [0]
            storage.emulated_streams = {self._streams.current}
            weakref.finalize(storage, self._free, held).atexit = False
        held[0] += more

    def record_stream(self, tensor: Any, stream: EmulatedStream) -> None:
        """Let ``stream`` use a tensor of the device; once freed, its memory waits for it."""
        tensor.inner.untyped_storage().emulated_streams.add(stream)

    def check_stream(self, tensor: torch.Tensor) -> None:
        """Raise :class:`StreamError` where the current stream may not use an inner tensor."""
        streams = getattr(tensor.untyped_storage(), "emulated_streams", None)
        if streams is not None and self._streams.current not in streams:
            raise StreamError("a tensor of another stream is used without record_stream")

    def _free(self, held: list[int]) -> None:
        with self._lock:
            self.allocated_bytes -= held[0]

    def forget_peak(self) -> None:
        """Begin a new peak."""
        self.peak_bytes = self.allocated_bytes


@dataclass(slots=True)
class _Unfinished:
    """A copy with ``non_blocking``; ``values`` are the source's when it was issued."""

    host: torch.Tensor
    values: torch.Tensor
    is_to_host: bool
    where: str
    is_finished: bool = False

    def finish(self) -> None:
        if self.is_finished:
            return
        self.is_finished = True
        if self.is_to_host:
            self.host.copy_(self.values)
        elif not _has_bits(self.host, self.values):
            raise HostMemoryError(
                f"pinned memory was overwritten before the copy at {self.where} was waited for"
            )


def _has_bits(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors of the host are equal, where NaN equals NaN."""
    return bool(((tensor == expected) | ((tensor != tensor) & (expected != expected))).all())


class EmulatedStream:
    """A stream: the copies issued on it that are not finished.

    It has the methods of :class:`torch.Stream`, and is a context manager too.
    """

    def __init__(
        self, device: object = None, *, priority: int = 0, streams: Streams | None = None
    ) -> None:
        """Begin idle, among the streams of the device that is emulated now."""
        self._streams = streams = streams or Streams.active()
        streams.all.add(self)
        self._before: list[EmulatedStream] = []
        self.device = streams.device
        self.unfinished: list[_Unfinished] = []

    def synchronize(self) -> None:
        """Finish the copies."""
        unfinished, self.unfinished = self.unfinished, []
        for copy in unfinished:
            copy.finish()

    def query(self) -> bool:
        """Finish the copies; returns true."""
        self.synchronize()
        return True

    def record_event(self, event: EmulatedEvent | None = None) -> EmulatedEvent:
        """Record an event after the copies so far."""
        event = event or EmulatedEvent()
        event.record(self)
        return event

    def wait_event(self, event: EmulatedEvent) -> None:
        """Let the stream's later work come after the event."""
        self.add(event.unfinished)

    def wait_stream(self, stream: EmulatedStream) -> None:
        """Let the stream's later work come after another stream's work so far."""
        self.add(stream.unfinished)

    def add(self, copies: Sequence[_Unfinished]) -> None:
        """Issue copies; those that were finished meanwhile are forgotten."""
        self.unfinished = [copy for copy in (*self.unfinished, *copies) if not copy.is_finished]

    def __enter__(self) -> Self:
        """Make it the thread's current stream."""
        self._before.append(self._streams.current)
        self._streams.current = self
        return self

    def __exit__(self, *_: object) -> None:
        """Make the stream before it current again."""
        self._streams.current = self._before.pop()


class EmulatedEvent:
    """An event: the unfinished copies of the stream on which it was recorded.

    It has the methods of :class:`torch.Event` but ``elapsed_time``, since nothing takes time here.
    """

    def __init__(self, device: object = None, *, blocking: bool = False) -> None:
        """Begin unrecorded, which counts as passed."""
        self._streams = Streams.active()
        self.device = self._streams.device
        self.unfinished: list[_Unfinished] = []

    def record(self, stream: EmulatedStream | None = None) -> None:
        """Record the copies so far of a stream, the current one by default."""
        self.unfinished = list((stream or self._streams.current).unfinished)

    def synchronize(self) -> None:
        """Finish the copies before the event."""
        for copy in self.unfinished:
            copy.finish()

    def query(self) -> bool:
        """Finish the copies before the event; returns true."""
        self.synchronize()
        return True

    def wait(self, stream: EmulatedStream | None = None) -> None:
        """Let a stream's later work come after the event."""
        (stream or self._streams.current).wait_event(self)


class Streams:
    """The streams of the device; each thread has a current one, first the default stream."""

    _active: ClassVar[Streams | None] = None

    def __init__(self, device: torch.device) -> None:
        """Begin with the default stream alone."""
        self.device = device
        self.all: weakref.WeakSet[EmulatedStream] = weakref.WeakSet()
        self._default = EmulatedStream(streams=self)
        self._of_thread = threading.local()

    @classmethod
    def active(cls) -> Streams:
        """Return the streams of the device that is emulated now."""
        if cls._active is None:
            raise RuntimeError("no device is emulated")
        return cls._active

    @property
    def current(self) -> EmulatedStream:
        """The current stream of this thread."""
        stream: EmulatedStream = getattr(self._of_thread, "stream", self._default)
        return stream

    @current.setter
    def current(self, stream: EmulatedStream) -> None:
        self._of_thread.stream = stream

    def synchronize(self) -> None:
        """Finish the copies of all streams."""
        for stream in list(self.all):
            stream.synchronize()

    def to_host(
        self, host: torch.Tensor, values: torch.Tensor, is_blocking: bool, where: str
    ) -> None:
        """Copy ``values`` of the device to a host tensor.

        A blocking copy waits for the current stream, as CUDA's does.
        """
        if is_blocking:
            self.current.synchronize()
            host.copy_(values)
            return
        copy = _Unfinished(host, values.to(host.dtype, copy=True), True, where)
        host.fill_(_wrong_value(host.dtype))
        self.current.add([copy])

    def from_host(self, host: torch.Tensor, is_blocking: bool, where: str) -> None:
        """Watch a host tensor that was copied from, where the copy may still be under way.

        A copy from memory that is not pinned has read it before the call returns.
        """
        if not is_blocking and is_pinned(host):
            copy = _Unfinished(host.detach(), host.detach().clone(), False, where)
            self.current.add([copy])


def _wrong_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype is torch.bool else torch.iinfo(dtype).max


def _pinnable(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if pin_memory and not tensor.is_cpu:
            raise RuntimeError("only tensors of the host can be pinned")
        return mark_pinned(tensor) if pin_memory else tensor

    return made


def _pinned_copy(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    if not tensor.is_cpu:
        raise RuntimeError("only tensors of the host can be pinned")
    return tensor if is_pinned(tensor) else mark_pinned(tensor.clone())


@contextmanager
def patched_accelerator(memory: Memory, streams: Streams) -> Iterator[None]:
    """Make torch's functions for accelerators find the emulated device, in all threads."""
    device = streams.device
    accelerator: dict[str, Any] = {
        "current_accelerator": lambda check_available=False: torch.device(device.type),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": _check_index,
        "device_index": lambda index: nullcontext(_check_index(index)),
        "get_memory_info": lambda device_index=None: (
            memory.capacity_bytes - memory.allocated_bytes,
            memory.capacity_bytes,
        ),
        "memory_allocated": lambda device_index=None: memory.allocated_bytes,
        "max_memory_allocated": lambda device_index=None: memory.peak_bytes,
        "max_memory_reserved": lambda device_index=None: memory.peak_bytes,
        "reset_peak_memory_stats": lambda device_index=None: memory.forget_peak(),
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: streams.current,
        "set_stream": lambda stream: setattr(streams, "current", stream),
        "synchronize": lambda device=None: streams.synchronize(),
    }
    # torch keeps the set of its factories, so that set is made before they are replaced.
    _device._device_constructors()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Streams, "_active", streams))
        for name, replacement in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, replacement))
        for name in PINNABLE:
            stack.enter_context(mock.patch.object(torch, name, _pinnable(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "Stream", EmulatedStream))
        stack.enter_context(mock.patch.object(torch, "Event", EmulatedEvent))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pinned_copy))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_pinned", is_pinned))
        record = lambda tensor, stream: memory.record_stream(tensor, stream)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", record))
        yield


def _check_index(device: int | str | torch.device) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, 0):
        raise RuntimeError(f"the emulated accelerator has device 0 alone (given: {device})")
