"""Products with a weight in the memory layout of the processor's matrix unit.

In bf16, oneDNN rearranges the whole weight in every call of ``torch.nn.functional.linear``, which
takes as long as the product of a few rows. Here the weight is rearranged once, when it is loaded.

Dimension letters: T rows, I input size, O output size.
"""

from __future__ import annotations

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether oneDNN has a layout for a weight: bf16, on a CPU that supports it."""
    return (
        weight.is_cpu
        and weight.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a rearranged copy of ``weight`` [O, I] for :func:`packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight)


def packed_bytes(packed: torch.Tensor) -> int:
    """Return the bytes of a packed weight, with the padding of its layout."""
    return int(torch.ops.mkldnn._nbytes(packed))


_product = torch.ops.mkldnn._linear_pointwise.default


def packed_linear(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Map rows [..., T, I] to [..., T, O]."""
    return _product(rows, packed, None, "none", [], "")
