"""Arithmetic whose result for a row has the same bits alone and in any batch.

BLAS adds up a product in an order that depends on the number of rows. A row near a tie of its gate
could then change its expert with its batch mates. Here every sum is a fixed tree of elementwise
additions, which depends on the number of summands alone. Its error is that of a pairwise sum.

Rows are the last axis, so that elementwise operations are long whatever the width of a row.

Dimension letters: T rows, F values of a row, C outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np

TILE_VALUES = 1 << 17
"""The most products that are kept at once; half a megabyte of float32 stays in a processor's cache.
"""


class _Memory(threading.local):
    """Memory for a tile's products; fresh pages would cost four times the arithmetic."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array of any content, until the next call by this thread."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if num_bytes > len(self._bytes):
            self._bytes = np.empty(num_bytes, np.uint8)
        return self._bytes[:num_bytes].view(dtype).reshape(shape)


_memory = _Memory()


def sum_first(values: np.ndarray) -> np.ndarray:
    """Return the sum over the first axis, of at least one; ``values`` are overwritten."""
    count = len(values)
    while count > 1:
        half = count // 2
        # The middle of an odd number stays where it is.
        np.add(values[:half], values[count - half : count], out=values[:half])
        count -= half
    first: np.ndarray = values[0]
    return first


def linear_columns(columns: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Return ``weight`` x + ``bias`` as [C, T] of ``columns`` [F, T].

    ``weight`` [F, C] is transposed and contiguous, ``bias`` is [C] or absent; all have one dtype.
    """
    size, num_rows = columns.shape
    num_outputs = weight.shape[1]
    result = np.empty((num_outputs, num_rows), columns.dtype)
    step = max(1, TILE_VALUES // (size * min(num_outputs, 8)))  # rows of a tile
    for begin in range(0, num_rows, step):
        tile = np.ascontiguousarray(columns[:, begin : begin + step])[:, None, :]  # [F, 1, t]
        outputs = max(1, TILE_VALUES // (size * tile.shape[2]))
        for first in range(0, num_outputs, outputs):
            part = weight[:, first : first + outputs, None]  # [F, c, 1]
            products = _memory.array((*part.shape[:2], tile.shape[2]), columns.dtype)  # [F, c, t]
            np.multiply(part, tile, out=products)
            result[first : first + outputs, begin : begin + step] = sum_first(products)
    if bias is not None:
        result += bias[:, None]
    return result


def _relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, values.dtype.type(0))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    one = values.dtype.type(1)
    result: np.ndarray = one / (one + np.exp(-values))
    return result


def _silu(values: np.ndarray) -> np.ndarray:
    return values * _sigmoid(values)


def _tanh(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.tanh(values)
    return result


def _gelu(values: np.ndarray) -> np.ndarray:
    from scipy.special import erf  # slow to import and seldom needed

    scale, half = values.dtype.type(np.sqrt(0.5)), values.dtype.type(0.5)
    result: np.ndarray = half * values * (1 + erf(values * scale))
    return result


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": _relu,
    "tanh": _tanh,
    "gelu": _gelu,
    "silu": _silu,
    "sigmoid": _sigmoid,
}
"""By their names in ``mixture.yaml``; each works value by value, wherever the value lies."""
