"""numpy's arrays as raw bytes and back, with bfloat16, which numpy has from ml_dtypes.

An expert actor on a CPU has no other tensors: torch would take most of its start and its memory.
:mod:`cluster.wire.tensors` is the same for torch.

Dimension letter: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from cluster.wire.frames import Buffer

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
"""The dtypes that frames carry; the ``name`` of each is the frame's name."""


def array_of(data: Buffer, dtype: str, num_rows: int, row_shape: Sequence[int]) -> np.ndarray:
    """Return an array [N, *row_shape] over ``data`` without a copy, writable where ``data`` is."""
    return np.frombuffer(data, DTYPES[dtype]).reshape(num_rows, *row_shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of an array; no copy is made when it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
