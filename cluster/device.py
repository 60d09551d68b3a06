"""The device that a process computes on: its CPU, or the accelerator that Ray has given to it.

torch's one interface serves CUDA, ROCm and XPU. Ray shows a process its own devices alone, so the
first of them is meant.
"""

from __future__ import annotations

import psutil
import torch

CPU = torch.device("cpu")


def accelerator() -> torch.device | None:
    """Return the accelerator that torch finds in this process, ``None`` without one."""
    return torch.accelerator.current_accelerator(check_available=True)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free now in a device's memory."""
    if device.type == CPU.type:
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])
