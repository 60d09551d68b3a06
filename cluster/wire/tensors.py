"""torch's tensors as raw bytes and back, without pickle; :mod:`cluster.wire.arrays` has numpy's.

Dimension letters: N rows, T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cluster.native import native
from cluster.wire.arrays import DTYPES

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# numpy, which has no bfloat16, moves small lots of rows in a fraction of torch's time.
_RAW_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Received bytes are read-only and nobody writes to them; torch warns about it on first use.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the frame's name of a dtype; ``KeyError`` for one that frames do not carry."""
    return _NAMES[dtype]


def to_bytes(rows: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor; no copy is made when it is contiguous on the CPU."""
    if not rows.is_cpu:
        rows = rows.cpu()
    rows = rows.contiguous()
    if native is not None:
        view: memoryview = native.view(rows, rows.data_ptr(), rows.nbytes)
        return view
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy().data)


def to_span(rows: torch.Tensor) -> memoryview:
    """Return the bytes from a tensor's first value to its last, on the CPU, whatever its strides.

    Without a copy; only for native code, which is told the strides. Raises :class:`RuntimeError`
    where that was not built.
    """
    if native is None:
        raise RuntimeError("spans need native code, which is not built here")
    steps = zip(rows.shape, rows.stride(), strict=True)
    last = sum((count - 1) * stride for count, stride in steps)
    view: memoryview = native.view(rows, rows.data_ptr(), (last + 1) * rows.itemsize)
    return view


def to_ids(ids: torch.Tensor) -> np.ndarray:
    """Return integers [T, K] as int64 in a numpy array on the CPU; no copy where they are that."""
    whole = ids if ids.dtype == torch.int64 else ids.long()
    # Two thirds of the time of ``cpu().numpy()``, where other processes have had the caches.
    return np.frombuffer(to_bytes(whole), np.int64).reshape(ids.shape)


def from_bytes(
    data: bytes | memoryview, dtype: str, num_rows: int, row_shape: Sequence[int]
) -> torch.Tensor:
    """Return a tensor [N, *row_shape] over ``data`` without a copy; it must not be written to."""
    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).view(num_rows, *row_shape)


def to_raw(rows: torch.Tensor) -> np.ndarray:
    """Return a tensor's bits as integers in a numpy array on the CPU; no copy when it is there."""
    integers = _RAW_DTYPES[rows.element_size()]
    if not rows.is_cpu or rows.requires_grad:
        rows = rows.detach().cpu()
    raw: np.ndarray = rows.view(integers).numpy()
    return raw


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of a frame's dtype as an array; no copy when it is on the CPU."""
    return to_raw(tensor).view(DTYPES[dtype_name(tensor.dtype)])


def from_array(array: np.ndarray) -> torch.Tensor:
    """Return an array of a frame's dtype as a tensor on the CPU, without a copy."""
    raw = torch.from_numpy(array.view(f"i{array.itemsize}"))
    return raw.view(TORCH_DTYPES[array.dtype.name])


class MicrobatchBuffers:
    """Memory that the layers of a step's piece use one after the other.

    To allocate a small tensor takes torch longer than a row's sums, where other processes have had
    the processor's caches. What a layer has here lasts until the piece's next layer has it.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._made: dict[str, tuple[object, Any]] = {}
        self._bytes: dict[str, tuple[torch.Tensor, memoryview]] = {}

    def choice(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
        """Return memory for a gate's ids, int64 [T, K], and weights [T, K] of a dtype."""
        return self._kept(  # type: ignore[no-any-return]
            "choice",
            (shape, dtype),
            lambda: (np.empty(shape, np.int64), torch.empty(shape, dtype=dtype)),
        )

    def sums(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for sums [T, H] of the shape and dtype of ``like``."""
        key = like.shape, like.dtype
        return self._kept(  # type: ignore[no-any-return]
            "sums", key, lambda: torch.empty_like(like, memory_format=torch.contiguous_format)
        )

    def _kept(self, name: str, key: object, make: Callable[[], Any]) -> Any:
        kept = self._made.get(name)
        if kept is None or kept[0] != key:
            kept = self._made[name] = key, make()
        return kept[1]

    def bytes_of(self, name: str, rows: torch.Tensor) -> memoryview:
        """Return :func:`cluster.wire.tensors.to_bytes`; of the same tensor at once."""
        kept = self._bytes.get(name)
        if kept is not None and kept[0] is rows:
            return kept[1]
        view = to_bytes(rows)
        if rows.is_contiguous() and rows.is_cpu:  # no copy, which would grow old
            self._bytes[name] = rows, view
        return view
