"""The device that a process computes on: its CPU, or the accelerator that Ray has given to it.

torch has one interface for CUDA, ROCm and XPU. Ray shows a process only its own devices, so the
first of them is used.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch

from cluster.errors import NoRoomError, UnavailableError

CPU = torch.device("cpu")
logger = logging.getLogger("expertmesh.device")
end_process = partial(os._exit, 1)
"""Ends a process whose device is in error: everything that follows would fail there."""

_FULL = "out of memory", "_STATUS_ALLOC_FAILED"
"""What the driver and cuBLAS, hipBLAS or cuDNN say of a full memory."""


def accelerator() -> torch.device | None:
    """Return the accelerator that torch finds in this process, ``None`` without one."""
    return torch.accelerator.current_accelerator(check_available=True)


def device_of(kind: str, num_gpus: float, field: str) -> torch.device:
    """Return the device of a process to which Ray has given ``num_gpus``.

    ``kind`` is ``cpu``, ``accelerator``, or ``auto``: the accelerator where ``num_gpus`` is above
    0. Raises :class:`UnavailableError` for ``field`` if torch finds no accelerator.
    """
    if kind == "cpu" or (kind == "auto" and num_gpus == 0):
        return CPU
    found = accelerator()
    if found is None:
        raise UnavailableError(
            f"torch {torch.__version__} finds no accelerator on {socket.gethostname()}; install "
            "torch with support for it there, or configure the CPU",
            field,
        )
    return found


def name_of(device: torch.device) -> str:
    """Return a device's name as its driver gives it, and its kind where torch asks no driver."""
    asked = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return device.type if asked is None else str(asked(device))


def check_room(device: torch.device, needed_bytes: int, field: str) -> None:
    """Raise :class:`NoRoomError` for ``field`` if an accelerator has too little memory."""
    if device == CPU or needed_bytes <= free_bytes(device):
        return
    torch.accelerator.empty_cache()  # what torch keeps for later tensors counts as taken
    if needed_bytes > free_bytes(device):
        raise no_room(device, needed_bytes, field)


def no_room(device: torch.device, needed_bytes: int, field: str) -> NoRoomError:
    """Return the error of a device whose memory has no room for ``needed_bytes``."""
    where = f"{device} of {socket.gethostname()}"
    return NoRoomError(where, needed_bytes, free_bytes(device), field)


@contextmanager
def room_told(device: torch.device, needed_bytes: int, field: str) -> Iterator[None]:
    """Raise :class:`NoRoomError` for ``field`` where an accelerator's memory is full within.

    Others may have taken memory that was free when it was looked at. What torch says is logged.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        logger.warning("%s: %s", field, error)
        raise no_room(device, needed_bytes, field) from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that an accelerator's memory is full.

    torch's allocator says so by its class, the driver and libraries of products in their text.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


def has_broken(error: BaseException) -> bool:
    """Return whether an error of a computation on this process's accelerator means its end.

    An error may be the device's or the computation's own, whatever its class: torch's
    ``AcceleratorError`` has all that a driver returns. So the device is asked whether it still
    works; one in error fails everything that follows. Waits for all of its work.
    """
    if not isinstance(error, RuntimeError) or lacks_memory(error) or accelerator() is None:
        return False
    try:
        torch.accelerator.synchronize()
    except RuntimeError:
        return True
    return False


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free now in a device's memory."""
    if device.type == CPU.type:
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])
