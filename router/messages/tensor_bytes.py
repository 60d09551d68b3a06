"""Tensors in the bytes of the Open Inference Protocol, as gateways and clients exchange them.

Values are row-major and little-endian. A text (``BYTES``) is its length in 4 bytes, and its UTF-8.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np

TEXT = "BYTES"
"""The datatype of texts; their arrays are numpy's unicode."""
NUMPY_DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The dtype of each datatype of fixed size that a mixture's inputs and outputs may have."""
_LENGTH = struct.Struct("<I")


def datatype_of(array: np.ndarray) -> str:
    """Return the datatype of an array; raises ``ValueError`` where the protocol has none for it."""
    if array.dtype.kind == "U":
        return TEXT
    little_endian = array.dtype.newbyteorder("<")
    for datatype, dtype in NUMPY_DTYPES.items():
        if little_endian == dtype:
            return datatype
    allowed = ", ".join(str(dtype) for dtype in NUMPY_DTYPES.values())
    raise ValueError(f"is an array of {array.dtype}; allowed: {allowed}")


def bytes_of(array: np.ndarray) -> bytes:
    """Return the bytes of an array; raises ``ValueError`` as :func:`datatype_of` does."""
    if datatype_of(array) != TEXT:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = array.ravel().tolist()
    packed = {}
    for text in set(texts):
        data = text.encode()
        packed[text] = _LENGTH.pack(len(data)) + data
    return b"".join([packed[text] for text in texts])


def array_of(datatype: str, shape: Sequence[int], data: bytes | memoryview) -> np.ndarray:
    """Return the array of some bytes; numbers are a read-only view of them.

    Every length is checked before memory is taken. Raises ``ValueError`` for another number of
    bytes than ``shape`` needs, a BOOL that is neither 0 nor 1, and a text that is no UTF-8.
    """
    count = math.prod(shape)
    if datatype == TEXT:
        return np.array(_texts(data, count), np.str_).reshape(shape)
    dtype = NUMPY_DTYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise ValueError(
            f"has {len(data)} bytes, must have {count * dtype.itemsize}: {count} values of "
            f"{datatype}"
        )
    if dtype == np.bool_ and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError("has a byte that is neither 0 nor 1, must be BOOL")
    return np.frombuffer(data, dtype).reshape(shape)


def _texts(data: bytes | memoryview, count: int) -> list[str]:
    if len(data) < count * _LENGTH.size:
        raise ValueError(f"has {len(data)} bytes, too few for the lengths of {count} texts")
    texts: list[str] = []
    offset = 0
    for _ in range(count):
        if len(data) - offset < _LENGTH.size:
            raise ValueError(f"ends before text {len(texts)} of {count}")
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if length > len(data) - offset:
            raise ValueError(f"ends within text {len(texts)} of {count}, which has {length} bytes")
        texts.append(str(data[offset : offset + length], "utf-8"))
        offset += length
    if offset != len(data):
        raise ValueError(f"has {len(data) - offset} bytes after its {count} texts")
    return texts
