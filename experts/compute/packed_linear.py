"""Products with a weight that lies in memory as the processor's matrix unit reads it.

``torch.nn.functional.linear`` in bf16 has oneDNN rearrange the whole weight at every call, which
costs as much as a product of a few rows itself. Here that is done once, at loading.

Dimension letters: T rows, I input size, O output size.
"""

from __future__ import annotations

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """Say whether oneDNN has a layout for a weight: bf16, on a CPU that computes in it."""
    return (
        weight.is_cpu
        and weight.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a rearranged copy of ``weight`` [O, I], for :func:`packed_linear` alone."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight)
    return packed


def packed_bytes(packed: torch.Tensor) -> int:
    """Return the bytes that a packed weight takes, with what the layout pads it by."""
    return int(torch.ops.mkldnn._nbytes(packed))


_product = torch.ops.mkldnn._linear_pointwise.default


def packed_linear(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Map rows [..., T, I] to [..., T, O]."""
    return _product(rows, packed, None, "none", [], "")  # type: ignore[no-any-return]
