"""A client's tensors, from JSON lists or bytes to checked arrays, and arrays to JSON lists.

Dimension letter: P rows, the batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from cluster.errors import InvalidRequestError, NotFiniteError, shown
from experts.mixture.parts import Input
from router.gateway.input import checks
from router.messages.tensor_bytes import NUMPY_DTYPES, array_of

MAX_ROWS = 65_536
"""The most rows of a request, whatever their size."""
MAX_AXIS = 2**31 - 1
_NUMBERS: Mapping[str, tuple[frozenset[type], str]] = {
    "BOOL": (frozenset({bool}), "true or false"),
    "UINT8": (frozenset({int}), "an integer from 0 to 255"),
    "INT32": (frozenset({int}), "an integer of 32 bits"),
    "INT64": (frozenset({int}), "an integer of 64 bits"),
    "FP32": (frozenset({int, float}), "a number"),
    "FP64": (frozenset({int, float}), "a number"),
}
"""The types of JSON that the values of a datatype have, and their description."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """An input as a client sent it, unchecked.

    ``data`` is a list, flat or nested as ``shape`` says, or the tensor's bytes.
    """

    name: str
    datatype: object
    shape: Sequence[object]
    data: list[Any] | bytes | memoryview


def checked_array(raw: RawTensor, given: Input) -> np.ndarray:
    """Return an input's array [P, *shape], C-contiguous and without NaN and infinities.

    It may be a read-only view of the client's bytes. Raises :class:`InvalidRequestError` that names
    the tensor, before memory is taken for another size than the request's own.
    """
    where = f"inputs.{given.name}"
    if raw.datatype != given.datatype:
        raise InvalidRequestError(checks.wrong(raw.datatype, given.datatype), f"{where}.datatype")
    shape = _checked_shape(raw.shape, given, f"{where}.shape")
    try:
        if isinstance(raw.data, list):
            array = _array_of_list(raw.data, given.datatype, shape)
        else:
            array = array_of(given.datatype, shape, raw.data)
    except ValueError as error:
        raise InvalidRequestError(str(error), where) from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, value = _first_not_finite(array)
        raise InvalidRequestError(
            f"row {row} has {value}; all values must be finite in {given.datatype}", where
        )
    return array


def json_list(array: np.ndarray, where: str) -> list[Any]:
    """Return the values of an array in row-major order, for JSON.

    Raises :class:`NotFiniteError` for a value that JSON has no number for.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, value = _first_not_finite(array)
        raise NotFiniteError(
            f"row {row} has {value}, which JSON cannot represent; request it with binary_data",
            where,
        )
    return array.ravel().tolist()


def _first_not_finite(array: np.ndarray) -> tuple[int, float]:
    place = np.unravel_index(np.flatnonzero(~np.isfinite(array))[0], array.shape)
    return int(place[0]), float(array[place])


def _checked_shape(shape: Sequence[object], given: Input, where: str) -> tuple[int, ...]:
    axes = tuple(
        checks.integer(axis, f"{where}[{place}]", 1, MAX_AXIS) for place, axis in enumerate(shape)
    )
    allowed = (-1, *given.shape)
    if len(axes) != len(allowed) or any(
        n not in (-1, axis) for n, axis in zip(allowed, axes, strict=True)
    ):
        raise InvalidRequestError(
            f"must be {list(allowed)}, where -1 is any length; got {list(axes)[:8]}", where
        )
    if axes[0] > MAX_ROWS:
        raise InvalidRequestError(f"has {axes[0]} rows; at most {MAX_ROWS}", where)
    return axes


def _array_of_list(data: list[Any], datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    flat = _flattened(data, shape)
    count = math.prod(shape)
    if len(flat) != count:
        raise ValueError(f"data has {len(flat)} values; its shape needs {count}")
    types, allowed = _NUMBERS[datatype]
    if not types.issuperset(map(type, flat)):
        place = next(place for place, value in enumerate(flat) if type(value) not in types)
        raise ValueError(f"data[{place}]: {checks.wrong(flat[place], allowed)}")
    dtype = NUMPY_DTYPES[datatype]
    if dtype.kind == "f":
        try:
            doubles = np.array(flat, np.float64)
        except OverflowError:
            raise ValueError("data has an integer that is too large for a float") from None
        with np.errstate(over="ignore"):  # an infinity is found later, with its row
            return doubles.astype(dtype, copy=False).reshape(shape)
    if dtype.kind == "b":
        return np.array(flat, dtype).reshape(shape)
    limits = np.iinfo(dtype)
    low, high = min(flat), max(flat)
    if low < limits.min or high > limits.max:
        wrong = low if low < limits.min else high
        raise ValueError(f"data has {shown(wrong)}; each value must be {allowed}")
    return np.array(flat, dtype).reshape(shape)


def _flattened(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return the values of a flat list, or of lists that are nested as the shape says."""
    if not data or not isinstance(data[0], list):
        return data
    level = [data]
    for depth, axis in enumerate(shape):
        for part in level:
            if not isinstance(part, list) or len(part) != axis:
                found = f"a list of {len(part)}" if isinstance(part, list) else shown(part)
                raise ValueError(
                    f"data has {found} on axis {depth}; its shape needs a list of {axis}"
                )
        level = list(chain.from_iterable(level))
    return level
