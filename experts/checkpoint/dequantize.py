"""The values of quantised tensors, whose storage :mod:`experts.checkpoint.quantization` describes.

Dimension letters: E experts, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts.checkpoint.quantization import MXFP4, MXFP4_BLOCK, Packed

Rows = tuple[int, int] | None
Read = Callable[[str, Rows], torch.Tensor]
"""Reads rows (begin, end) of the first axis of a stored tensor, or all rows."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PAIRS = torch.tensor(
    [[(_E2M1[n & 7] * (-1 if n & 8 else 1)) for n in (byte & 15, byte >> 4)] for byte in range(256)]
)
"""[256, 2], the two numbers of each byte, the lower half first."""
_POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")])
"""[256], the factor of each scale (E8M0)."""
_BLOCKS_AT_ONCE = 1 << 13
"""The numbers of so many blocks take 1 MB in float32, beside the result."""


def dequantized(packed: Packed, read: Read, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of the first axis of a quantised tensor, or all rows, in ``dtype``.

    Only the codes of these rows are read, and the scales of their blocks. A value is computed in
    float32 and rounded once.
    """
    rows = rows or (0, packed.shape[0])
    if packed.method == MXFP4:
        return _mxfp4(packed, read, rows, dtype)
    values = torch.empty((rows[1] - rows[0], *packed.shape[1:]), dtype=dtype)
    dequantize_fp8(packed, read, rows, values)
    return values


def dequantize_fp8(packed: Packed, read: Read, rows: tuple[int, int], into: torch.Tensor) -> None:
    """Fill ``into`` [N, K] of any dtype with each block times its scale, by rows of blocks."""
    (begin, end), (height, width) = rows, packed.block
    codes = read(packed.codes, (begin, end))
    scales = read(packed.scales, (begin // height, -(-end // height))).float()
    first = 0
    for number, row in enumerate(scales, begin // height):
        last = min(end, (number + 1) * height) - begin
        factors = row.repeat_interleave(width)[: codes.shape[1]]
        into[first:last] = codes[first:last].float() * factors
        first = last


def _mxfp4(packed: Packed, read: Read, rows: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers [E, N, K] of codes that are stored as [E, K, N]."""
    codes, scales = read(packed.codes, rows), read(packed.scales, rows)
    values = torch.empty((codes.shape[0], codes.shape[1], packed.shape[1]), dtype=dtype)
    blocks = codes.view(-1, MXFP4_BLOCK // 2), scales.view(-1), values.view(-1, MXFP4_BLOCK)
    pieces = (tensor.split(_BLOCKS_AT_ONCE) for tensor in blocks)
    for bytes_, exponents, into in zip(*pieces, strict=True):
        numbers = _PAIRS.index_select(0, bytes_.flatten().int()).view(into.shape)
        numbers *= _POWERS.index_select(0, exponents.int()).unsqueeze(1)
        into.copy_(numbers)
    return values.transpose(1, 2)
