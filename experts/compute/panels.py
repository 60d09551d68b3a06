"""Weights as native code reads them: packed panels, and the formats of numbers.

A panel has the K rows of ``PANEL`` outputs, so that a product reads weights in the order of memory.
``cluster/native/kernels.h`` has the layout.

Dimension letters: O outputs, K length of a sum.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from experts.checkpoint.expert_weights import paged

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The number of each dtype in native code."""
SIDE = 16
PANEL = 2 * SIDE


def pack_matrix(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``weight`` [O, K] in panels, in bytes, and after it ``bias`` [O] in float32."""
    units = matrix_units(weight)
    panels = -(-len(weight) // PANEL)
    size = panels * PANEL * units.shape[1] * units.dtype.itemsize
    bias_bytes = 0 if bias is None else panels * PANEL * 4
    packed = paged((size + bias_bytes,), torch.uint8)
    fill_panels(units, packed[:size].view(units.dtype).view(panels, -1, PANEL))
    if bias is not None:
        padded = packed[size:].view(torch.float32)
        padded[: len(bias)].copy_(bias)
        padded[len(bias) :].zero_()
    return packed


def matrix_units(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix [O, K] as the units of its panels: two bfloat16 are one [O, K / 2]."""
    matrix = matrix.contiguous()
    if matrix.dtype != torch.bfloat16:
        return matrix
    odd = matrix.shape[1] % 2
    return (functional.pad(matrix, (0, odd)) if odd else matrix).view(torch.int32)


def fill_panels(matrix: torch.Tensor, panels: torch.Tensor) -> None:
    """Write a matrix [O, K] into panels [O / side, K, side]; outputs beyond the last are zero."""
    side = panels.shape[2]
    whole, left = divmod(len(matrix), side)
    blocks = matrix[: whole * side].view(whole, side, matrix.shape[1])
    panels[:whole].copy_(blocks.transpose(1, 2))
    if left:
        panels[whole].zero_()
        panels[whole, :, :left].copy_(matrix[whole * side :].t())
