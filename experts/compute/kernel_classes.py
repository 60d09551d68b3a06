"""Kernel classes: the names of the orders of sums and roundings in which rows are computed.

Processes of one class give a row the same bits. The classes of native code promise that, and that a
row's bits do not depend on other rows: ``fused``, ``paired``, ``tiled`` and ``unfused``
(:func:`experts.compute.native_ffn.kernel_class`). Any other class is torch's own: ``torch-`` with
the processor's instructions, or a device's name. torch promises neither; two of its classes
certainly differ.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from cluster.device import CPU, name_of
from cluster.native import native

NATIVE_CLASSES = frozenset({"fused", "paired", "tiled", "unfused"})
"""The classes in which a row's bits depend only on the row and the weights."""
_HALVES = (torch.bfloat16, torch.float16)
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that forbid oneDNN, which computes torch's products in 16 bits, some instructions."""

logger = logging.getLogger("expertmesh.actor")


def torch_class(device: torch.device, dtype: torch.dtype) -> str:
    """Return the class of torch's own kernels for a dtype on a device."""
    return name_of(device) if device.type != CPU.type else f"torch-{_instructions(dtype)}"


def _instructions(dtype: torch.dtype) -> str:
    """Return the name of the processor's instructions that torch may use for a dtype."""
    if dtype in _HALVES:
        limit = next((os.environ[name] for name in _LIMITS if name in os.environ), None)
        if limit is not None:
            return limit.lower()
        if torch.cpu._is_amx_tile_supported():
            return "amx"
        if torch.cpu._is_avx512_bf16_supported():
            return "avx512_bf16"
    return torch.backends.cpu.get_cpu_capability().lower()


@functools.cache
def log_torch(own: str, hidden_size: int, intermediate_size: int, dtype: str) -> None:
    """Log that torch computes an expert on the CPU, and why; once a process for equal arguments."""
    if native is None:
        reason = "the package was installed without its native code, which needs a C compiler"
    else:
        reason = "native code has no kernel for this dtype or these sizes"
    logger.warning(
        "experts of %d x %d in %s are computed by torch (%s): %s",
        hidden_size,
        intermediate_size,
        dtype,
        own,
        reason,
    )
