"""Weights as native code reads them: packed panels, and the formats of numbers.

A panel has the K rows of ``PANEL`` outputs, so that a product reads weights in the order of memory.
``native/experts/kernels.h`` has the layout.

Dimension letters: O outputs, K length of a sum.
"""

from __future__ import annotations

import numpy as np

from experts.checkpoint.expert_weights import paged

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The number of each dtype in native code."""
SIDE = 16
PANEL = 2 * SIDE
BYTES, FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)


def pack_matrix(weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``weight`` [O, K] in panels, in bytes, and after it ``bias`` [O] in float32."""
    units = matrix_units(weight)
    panels = -(-len(weight) // PANEL)
    size = panels * PANEL * units.shape[1] * units.itemsize
    bias_bytes = 0 if bias is None else panels * PANEL * 4
    packed = paged((size + bias_bytes,), BYTES)
    fill_panels(units, packed[:size].view(units.dtype).reshape(panels, -1, PANEL))
    if bias is not None:
        padded = packed[size:].view(FLOAT32)
        padded[: len(bias)] = bias
        padded[len(bias) :] = 0
    return packed


def matrix_units(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix [O, K] as the units of its panels: two bfloat16 are one [O, K / 2]."""
    matrix = np.ascontiguousarray(matrix)
    if matrix.dtype.name != "bfloat16":
        return matrix
    bits = matrix.view(np.uint16)
    odd = matrix.shape[1] % 2
    return (np.pad(bits, ((0, 0), (0, odd))) if odd else bits).view(np.uint32)


def fill_panels(matrix: np.ndarray, panels: np.ndarray) -> None:
    """Write a matrix [O, K] into panels [O / side, K, side]; outputs beyond the last are zero."""
    side = panels.shape[2]
    whole, left = divmod(len(matrix), side)
    blocks = matrix[: whole * side].reshape(whole, side, matrix.shape[1])
    panels[:whole] = blocks.swapaxes(1, 2)
    if left:
        panels[whole] = 0
        panels[whole, :, :left] = matrix[whole * side :].T
