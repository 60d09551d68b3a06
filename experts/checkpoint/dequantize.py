"""The values of quantised tensors, whose storage :mod:`experts.checkpoint.quantization` describes.

Dimension letters: E experts, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from experts.checkpoint.quantization import MXFP4, MXFP4_BLOCK, Packed

Rows = tuple[int, int] | None
Read = Callable[[str, Rows], np.ndarray]
"""Reads rows (begin, end) of the first axis of a stored tensor, or all rows."""

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""[256], the number of each code of FP8."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PAIRS = np.array(
    [[_E2M1[n & 7] * (-1 if n & 8 else 1) for n in (byte & 15, byte >> 4)] for byte in range(256)],
    np.float32,
).view(np.complex64)[:, 0]
"""[256], the two numbers of each byte as one, the lower half first."""
_POWERS = np.array([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")], np.float32)
"""[256], the factor of each scale (E8M0)."""
_BLOCKS_AT_ONCE = 1 << 11
"""The numbers of so many blocks take 256 KiB in float32, beside the result."""


def dequantized(packed: Packed, read: Read, rows: Rows, dtype: np.dtype) -> np.ndarray:
    """Return rows of the first axis of a quantised tensor, or all rows, in ``dtype``.

    Only the codes of these rows are read, and the scales of their blocks. A value is computed in
    float32 and rounded once.
    """
    rows = rows or (0, packed.shape[0])
    if packed.method == MXFP4:
        return _mxfp4(packed, read, rows, dtype)
    values = np.empty((rows[1] - rows[0], *packed.shape[1:]), dtype)
    dequantize_fp8(packed, read, rows, values)
    return values


def dequantize_fp8(packed: Packed, read: Read, rows: tuple[int, int], into: np.ndarray) -> None:
    """Fill ``into`` [N, K] of any dtype with each block times its scale, by rows of blocks."""
    (begin, end), (height, width) = rows, packed.block
    codes = read(packed.codes, (begin, end)).view(np.uint8)
    scales = read(packed.scales, (begin // height, -(-end // height))).astype(np.float32)
    first = 0
    for number, row in enumerate(scales, begin // height):
        last = min(end, (number + 1) * height) - begin
        factors = row.repeat(width)[: codes.shape[1]]
        into[first:last] = _E4M3[codes[first:last]] * factors
        first = last


def _mxfp4(packed: Packed, read: Read, rows: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Return the numbers [E, N, K] of codes that are stored as [E, K, N]."""
    codes, scales = read(packed.codes, rows), read(packed.scales, rows).reshape(-1)
    values = np.empty((codes.shape[0], codes.shape[1], packed.shape[1]), dtype)
    blocks, places = codes.reshape(-1, MXFP4_BLOCK // 2), values.reshape(-1, MXFP4_BLOCK)
    for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some = slice(begin, begin + _BLOCKS_AT_ONCE)
        numbers = _PAIRS[blocks[some]].view(np.float32)
        places[some] = numbers * _POWERS[scales[some]][:, None]
    return values.swapaxes(1, 2)
