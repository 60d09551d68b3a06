"""A device for tests on machines without one: it shows where tensors are and what is copied.

A Python device under torch's ``privateuseone``. A tensor on it is a :class:`DeviceTensor`, a
wrapper around an inner tensor of the host, which computes everything. So results have the bits of
the host's. Four things are unlike the host:

- Each copy between host and device is counted, with its bytes and the line that made it.
- An implicit host read raises :class:`HostReadError`: ``item``, ``bool``, ``tolist``, ``numpy``,
  ``data_ptr``, ``equal``, and operations with shapes that depend on values, such as ``nonzero`` and
  an index by a mask. ``cpu()``, ``to("cpu")``, ``numpy(force=True)`` and ``copy_`` are explicit.
- An operation on a tensor that another stream has made raises :class:`StreamError`, unless
  ``record_stream`` has named the operation's stream.
- An operation on tensors of both raises :class:`MixedDevicesError`. torch takes a scalar tensor of
  the host with tensors of a device, and so does this. CUDA also takes indices of the host, with a
  hidden copy; this does not.

The device shows placement and copies. It does not show overlap or speed: everything is computed at
once, on the calling thread. Its operations are the host's own, so one that a real device lacks
passes here. It is for inference.

::

    with emulated_device() as device, device.counted() as copies:
        rows = torch.randn(2, 8).to(device.device)
    assert [copy.num_bytes for copy in copies.to_device] == [64]

All threads see the device while the context is open, whoever starts them. One process has one;
:func:`emulate_process` is for the processes of a deployment.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from tests.emulated_accelerator import (
    EmulationError,
    Memory,
    Streams,
    is_pinned,
    patched_accelerator,
)
from tests.emulated_copies import Access, AccessLog, Copies, Kind, calling_line
from tests.emulated_flash import varlen_attention

DEVICE = torch.device("privateuseone:0")
"""torch has this type for devices outside of it; so no code can take it for CUDA."""

_INDEXED = ("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::_index_put_impl")
_MASKS = (torch.bool, torch.uint8)
_READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_HOST_METHODS = {
    getattr(torch.Tensor, name)
    for name in ("__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "numpy", "tolist")
}
_lone = threading.Lock()
_until_the_end = ExitStack()


class HostReadError(EmulationError):
    """The host has read values of the device without an explicit copy."""


class MixedDevicesError(EmulationError):
    """An operation has tensors of the host and of the device."""


_ERRORS = {Kind.HOST_READ: HostReadError, Kind.MIXED: MixedDevicesError}


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``inner`` is the tensor of the host that has its values."""

    inner: torch.Tensor
    emulated: EmulatedDevice

    @staticmethod
    def __new__(cls, inner: torch.Tensor, emulated: EmulatedDevice) -> DeviceTensor:
        """Wrap ``inner``."""
        # A view of a normal tensor is a normal tensor, also in inference mode.
        is_inference = inner.is_inference()
        as_is = is_inference == torch.is_inference_mode_enabled()
        with nullcontext() if as_is else torch.inference_mode(is_inference):
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=DEVICE,
            )
        made.inner, made.emulated = inner, emulated
        return made

    def __init__(self, inner: torch.Tensor, emulated: EmulatedDevice) -> None:
        """See :meth:`__new__`."""

    def __repr__(self) -> str:  # type: ignore[override]
        """Return dtype and shape; the values would be a host read."""
        return f"DeviceTensor({self.dtype}, {list(self.shape)})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse the host's methods and writes by a mask; keep attention whole, for its bits."""
        kwargs = kwargs or {}
        if func in _HOST_METHODS:
            if func is torch.Tensor.numpy and kwargs.get("force"):
                return args[0].detach().cpu().numpy()
            device = args[0].emulated
            device.note(Kind.HOST_READ, f"Tensor.{func.__name__}", args[0].nbytes)
            return func(args[0].inner, *args[1:], **kwargs)
        if func is torch.Tensor.__deepcopy__:
            return _deep_copy(*args)
        if func is torch.nn.functional.scaled_dot_product_attention and not torch.is_grad_enabled():
            given = [*args, *kwargs.values()]
            device = next(value.emulated for value in given if _is_on_device(value))
            return device.compute(func, args, kwargs)
        if func is torch.Tensor.__setitem__:
            mask = next(filter(_is_mask, _leaves([args[1]])), None)
            if mask is not None:  # torch 2.15 fills a number in without a read, older ones do not
                mask.emulated.note(Kind.HOST_READ, "Tensor.__setitem__", mask.nbytes)
                return mask.emulated.compute(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation of torch's, on at least one tensor of the device."""
        kwargs = kwargs or {}
        leaves = _leaves((*args, *kwargs.values()))
        return next(filter(_is_on_device, leaves)).emulated.run(func, args, kwargs)


def _leaves(values: Iterable[Any]) -> list[Any]:
    """Return an operation's arguments, and those in its lists. torch's own way is slow."""
    leaves = []
    for value in values:
        leaves += _leaves(value) if isinstance(value, list | tuple) else [value]
    return leaves


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a value with the function applied to it, or to each leaf of a list."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, part) for part in value])
    return function(value)


@functools.cache
def _traits(func: Any) -> tuple[str, bool, bool]:
    """Return an operation's name, whether torch can decompose it, and whether it reads values."""
    reads = not _READING_TAGS.isdisjoint(func.tags)
    return func.name(), func._can_decompose(), reads


@functools.cache
def _changes_arguments(func: Any) -> bool:
    """Return whether a function may change its arguments: all may but those that say otherwise."""
    return not hasattr(func, "_schema") or func._schema.is_mutable


def _is_on_device(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


def _is_mask(value: Any) -> bool:
    return _is_on_device(value) and value.dtype in _MASKS


def _deep_copy(tensor: torch.Tensor, memo: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied
    return memo[id(tensor)]


class EmulatedDevice:
    """The device: its tensors, its memory, its streams, and the record of accesses."""

    def __init__(self, memory_bytes: int) -> None:
        """See :func:`emulated_device`."""
        self.device = DEVICE
        self.streams = Streams(DEVICE)
        self.memory = Memory(memory_bytes, self.streams)
        self._log = AccessLog()

    def counted(self, *, tolerates: bool = False) -> AbstractContextManager[Copies]:
        """Return the accesses until the end of the context, those of all threads.

        With ``tolerates``, host reads and mixed operations are recorded and do not raise, whatever
        section is around or inside. Sections may nest.
        """
        return self._log.section(tolerates)

    def note(
        self,
        kind: Kind,
        operation: str,
        num_bytes: int,
        host: torch.Tensor | None = None,
        is_blocking: bool = True,
    ) -> str:
        """Record an access, and return its line; raises where it is forbidden and not tolerated."""
        where = calling_line()
        pinned = host is not None and is_pinned(host)
        access = Access(kind, operation, num_bytes, where, pinned, is_blocking)
        if not self._log.record(access) and kind in _ERRORS:
            raise _ERRORS[kind](str(access))
        return where

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation of torch's: on the inner tensors, or in parts."""
        name, decomposes, _ = _traits(func)
        if _reads_values(func, args, kwargs):
            self.note(Kind.HOST_READ, name, _device_bytes(args, kwargs))
            return self.compute(func, args, kwargs)
        if decomposes:
            return func.decompose(*args, **kwargs)
        if name == "aten::copy_":
            return self.copy(*args, **kwargs)
        if name == "torch_attn::_varlen_attn":
            return self.compute(varlen_attention, args, kwargs)
        if name == "aten::_to_copy" and _leaves_device(kwargs) and kwargs["device"].type == "cpu":
            return self._to_host(*args, **kwargs)
        return self.compute(func, args, kwargs)

    def compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute on the inner tensors; results are on the device, or where ``device`` says."""
        if any(map(_is_on_host, _leaves((*args, *kwargs.values())))):
            name = func.name() if hasattr(func, "name") else func.__name__
            self.note(Kind.MIXED, name, _device_bytes(args, kwargs))
        given: dict[int, torch.Tensor] = {}

        def inner_of(value: Any) -> Any:
            inner = value.inner if isinstance(value, DeviceTensor) else value
            if isinstance(value, DeviceTensor):
                self.memory.check_stream(inner)
            if isinstance(inner, torch.Tensor):
                given[id(inner)] = value
            return inner

        def wrapped(result: Any) -> Any:
            if not isinstance(result, torch.Tensor) or _leaves_device(kwargs):
                return result
            known = given.get(id(result))  # where the operation is in place, or has ``out``
            return self.wrap(result) if known is None else known

        inner_kwargs = {name: _mapped(inner_of, value) for name, value in kwargs.items()}
        if inner_kwargs.get("device") is not None and not _leaves_device(kwargs):
            inner_kwargs["device"] = torch.device("cpu")
        with torch.no_grad():
            results = func(*_mapped(inner_of, tuple(args)), **inner_kwargs)
        if _changes_arguments(func):
            for tensor in filter(_is_on_device, given.values()):
                self._reshape(tensor)
        return _mapped(wrapped, results)

    def wrap(self, inner: torch.Tensor) -> DeviceTensor:
        """Return the tensor of the device with these values, without a copy."""
        self.memory.hold(inner)
        return DeviceTensor(inner, self)

    def _reshape(self, tensor: DeviceTensor) -> None:
        """Give a tensor the shape of its inner one, where an operation has changed that."""
        inner = tensor.inner
        if tensor.shape != inner.shape or tensor.stride() != inner.stride():
            self.memory.hold(inner)
            tensor.data = DeviceTensor(inner, self)

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        """Copy between host and device, or on the device; returns ``target``."""
        num_bytes = source.numel() * target.itemsize
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            target.inner.copy_(source.inner)
        elif isinstance(target, DeviceTensor):
            where = self.note(Kind.TO_DEVICE, "copy_", num_bytes, source, not non_blocking)
            target.inner.copy_(source)
            self.streams.from_host(source, not non_blocking, where)
        elif isinstance(source, DeviceTensor):
            where = self.note(Kind.TO_HOST, "copy_", num_bytes, target, not non_blocking)
            self.streams.to_host(target, source.inner, not non_blocking, where)
        return target

    def _to_host(
        self, tensor: DeviceTensor, *, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Return a copy on the host, of ``cpu()`` or ``to("cpu")``."""
        values = torch.ops.aten._to_copy(tensor.inner, **kwargs)
        where = self.note(
            Kind.TO_HOST, "_to_copy", values.nbytes, values, is_blocking=not non_blocking
        )
        host = torch.empty_like(values)
        self.streams.to_host(host, values, not non_blocking, where)
        return host

    def kernels(self) -> dict[str, Callable[..., torch.Tensor]]:
        """Return the operations that torch looks up by the device's type, not by a tensor's."""

        def empty(size: Sequence[int], *, memory_format: Any = None, **options: Any) -> Any:
            layout = memory_format or torch.contiguous_format
            return self.wrap(torch.empty(size, dtype=options.get("dtype"), memory_format=layout))

        def empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Any:
            return self.wrap(torch.empty_strided(size, stride, dtype=options.get("dtype")))

        def copy_from(source: Any, target: Any, non_blocking: bool = False) -> torch.Tensor:
            return self.copy(target, source, non_blocking)  # of ``tensor`` and of lists as indices

        def read(scalar: Any) -> Any:
            self.note(Kind.HOST_READ, "_local_scalar_dense", scalar.nbytes)
            return scalar.inner.item()  # of ``tensor`` over scalars of the device

        return {
            "empty.memory_format": empty,
            "empty_strided": empty_strided,
            "_copy_from": copy_from,
            "_local_scalar_dense": read,
        }


def _is_on_host(value: Any) -> bool:
    """Return whether a value is a tensor of the host that no device takes."""
    return isinstance(value, torch.Tensor) and value.is_cpu and value.dim() > 0


def _leaves_device(kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation's result is to be elsewhere: on the host, or ``meta``."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != DEVICE.type


def _device_bytes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    leaves = _leaves((*args, *kwargs.values()))
    return sum(leaf.nbytes for leaf in leaves if _is_on_device(leaf))


def _reads_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a device must hand values to the host for an operation's result or shape."""
    name, _, reads = _traits(func)
    if name.split(".")[0].rstrip("_") in _INDEXED:
        indices = args[1] if len(args) > 1 else kwargs["indices"]
        return any(map(_is_mask, indices))
    if name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is not None:
        return False
    return reads


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


@functools.cache
def _register_guard() -> _Guard:
    """Let torch's index code know the device's type; this stays, and makes no device available."""
    guard = _Guard()  # torch keeps no reference to it
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    return guard


@contextmanager
def emulated_device(memory_bytes: int = 16 << 30) -> Iterator[EmulatedDevice]:
    """Emulate a device of ``memory_bytes`` in this process, as ``torch.accelerator``'s only one.

    Raises ``RuntimeError`` where one is emulated already. A tensor of the device may be used
    afterwards, but nothing more can be copied to it or made on it.
    """
    if not _lone.acquire(blocking=False):
        raise RuntimeError("a device is emulated already")
    try:
        _register_guard()
        device = EmulatedDevice(memory_bytes)
        # Before it makes a first tensor, torch imports the module of the device's type. It stays.
        sys.modules.setdefault(f"torch.{DEVICE.type}", ModuleType(f"torch.{DEVICE.type}"))
        with (
            torch.library._scoped_library("aten", "IMPL") as library,
            patched_accelerator(device.memory, device.streams),
        ):
            for name, kernel in device.kernels().items():
                library.impl(name, kernel, "PrivateUse1")
            yield device
    finally:
        _lone.release()


def emulate_process() -> None:
    """Emulate a device until the process ends; Ray runs it as a ``worker_process_setup_hook``."""
    _until_the_end.enter_context(emulated_device())
