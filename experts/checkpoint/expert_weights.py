"""Loading the weights of single experts from a checkpoint.

Dimension letters: H hidden size, I intermediate size.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import ml_dtypes
import numpy as np

from cluster.wire.arrays import DTYPES
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.dequantize import dequantize_fp8, dequantized
from experts.checkpoint.quantization import FP8
from experts.checkpoint.stored import read_into
from experts.families.base import Part

_STORED_DTYPES = {
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}

Matrix = TypeVar("Matrix", bound=Any)
"""numpy's array on the host, torch's tensor where torch computes."""
Other = TypeVar("Other", bound=Any)


@dataclass(frozen=True, slots=True)
class GatedFfnWeights(Generic[Matrix]):
    """One expert's matrices: ``gate_up`` [2I, H], ``down`` [H, I].

    Families with biases also have ``gate_up_bias`` [2I] and ``down_bias`` [H].
    """

    gate_up: Matrix
    down: Matrix
    gate_up_bias: Matrix | None = None
    down_bias: Matrix | None = None

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights."""
        return sum(part.nbytes for part in self.parts())

    def map(self, change: Callable[[Matrix], Other]) -> GatedFfnWeights[Other]:
        """Return the weights with each matrix and bias changed."""
        return GatedFfnWeights(*map(change, self.parts()))

    def parts(self) -> list[Matrix]:
        """Return all matrices and biases."""
        parts = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return [part for part in parts if part is not None]


HostWeights = GatedFfnWeights[np.ndarray]
"""The weights of an expert on the host."""


@np.errstate(over="ignore", invalid="ignore")  # a checkpoint's numbers may exceed a narrower dtype
def load_expert(checkpoint: Checkpoint, layer_id: int, expert_id: int, dtype: str) -> HostWeights:
    """Read one expert's three matrices in ``dtype``, gate and up fused into one contiguous block.

    Only the bytes of this expert are read or fetched, each once. Beside the weights at most one
    stored matrix is in memory, and its dequantised values. Gate comes before up, as in
    transformers' fused parameter, so that results have the bits of its eager experts.
    """
    tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)
    groups: list[tuple[Part, ...]] = [(tensors.gate, tensors.up), (tensors.down,)]
    if tensors.biases:
        gate, up, down = tensors.biases
        groups += [(gate, up), (down,)]
    # Allocated first: in the heap, freed buffers then lie above the weights.
    wholes = [paged(_joined_shape(parts), DTYPES[dtype]) for parts in groups]
    for parts, whole in zip(groups, wholes, strict=True):
        _read(checkpoint, parts, whole)
    return GatedFfnWeights(*wholes)


def _joined_shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the shape of parts of equal shapes, one after the other by rows."""
    begin, end = parts[0].rows or (0, parts[0].shape[0])
    unread = np.broadcast_to(np.empty(()), (end - begin, *parts[0].shape[1:]))  # without memory
    num_rows, *columns = part_of(unread, parts[0]).shape
    return (len(parts) * num_rows, *columns)


def _read(checkpoint: Checkpoint, parts: Sequence[Part], whole: np.ndarray) -> None:
    """Read parts of equal shapes, one after the other by rows; a stored matrix may contain all.

    A part that is stored in its final form is read into its place, and FP8 is dequantised into it.
    """
    stored, stored_rows = None, None
    for part, place in zip(parts, np.split(whole, len(parts)), strict=True):
        if _is_stored_like(checkpoint, part, whole.dtype):
            _read_stored(checkpoint, part.name, part.rows, place)
            continue
        if _is_fp8_in_order(checkpoint, part):
            packed, rows = checkpoint.packed[part.name], part.rows or (0, part.shape[0])
            dequantize_fp8(packed, partial(_read_stored, checkpoint), rows, place)
            continue
        if stored is None or (part.name, part.rows) != stored_rows:
            stored = None  # before the next matrix takes memory
            stored = read_tensor(checkpoint, part.name, whole.dtype.name, part.rows)
            stored_rows = (part.name, part.rows)
        place[...] = part_of(stored, part)


def read_part(checkpoint: Checkpoint, part: Part, dtype: str) -> np.ndarray:
    """Read one matrix or bias of an expert; dtypes and errors as in :func:`read_tensor`."""
    return part_of(read_tensor(checkpoint, part.name, dtype, part.rows), part)


def _is_rearranged(part: Part) -> bool:
    return part.transposed or part.every is not None


def _is_fp8_in_order(checkpoint: Checkpoint, part: Part) -> bool:
    """Return whether a part is FP8 whose codes are in the order of its numbers."""
    packed = checkpoint.packed.get(part.name)
    if packed is None or packed.method != FP8 or part.stacked:
        return False
    return not _is_rearranged(part)


def _is_stored_like(checkpoint: Checkpoint, part: Part, dtype: np.dtype) -> bool:
    """Return whether the stored bytes of a part are those of the part in ``dtype``."""
    if part.name in checkpoint.packed or _is_rearranged(part):
        return False
    return _STORED_DTYPES[checkpoint.tensors[part.name].dtype] == dtype


def part_of(stored: np.ndarray, part: Part) -> np.ndarray:
    """Return a part as a view of the rows that were read for it, or that are to be written."""
    array = stored[0] if part.stacked else stored
    if part.transposed:
        array = array.T
    if part.every is not None:
        first, step = part.every
        array = array[first::step]
    return array


@np.errstate(over="ignore", invalid="ignore")
def read_tensor(
    checkpoint: Checkpoint, name: str, dtype: str, rows: tuple[int, int] | None = None
) -> np.ndarray:
    """Read one tensor of the model, from this node's disk or from another node.

    The result has the stored dtype, or ``dtype`` for a quantised tensor. ``rows`` (begin, end)
    selects rows of the first axis. Raises :class:`CheckpointError` when the file has changed since
    the checkpoint was opened.
    """
    packed = checkpoint.packed.get(name)
    if packed is None:
        return _read_stored(checkpoint, name, rows)
    return dequantized(packed, partial(_read_stored, checkpoint), rows, DTYPES[dtype])


def _read_stored(
    checkpoint: Checkpoint,
    name: str,
    rows: tuple[int, int] | None,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """Read rows of a stored tensor into ``into`` or into a new array; returns this array."""
    info = checkpoint.tensors[name]
    begin, end = rows or (0, info.shape[0])
    row_bytes = (info.end - info.begin) // info.shape[0]
    if into is None:
        into = np.empty((end - begin, *info.shape[1:]), _STORED_DTYPES[info.dtype])
    flat = into.reshape(-1).view(np.uint8)
    if checkpoint.remote is not None:
        data = checkpoint.remote.tensor(name, begin * row_bytes, end * row_bytes)
        flat[:] = np.frombuffer(data, np.uint8)
    else:
        read_into(checkpoint, name, begin * row_bytes, flat.data)
    return into


MIN_PAGED_BYTES = 64 << 10
"""Smaller arrays come from the heap: an array with its own pages wastes half a page."""

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def paged(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an empty array in pages of its own, which are freed with the array.

    In the heap, weights would lie between the buffers of their loading. An aligned block does not
    fit into the hole that a freed buffer of the same size leaves. So experts with small matrices
    would take up to half as much memory again. A lower mmap threshold of ``malloc`` does not help:
    every product would need fresh pages.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_PAGED_BYTES:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=_FLAGS), dtype).reshape(shape)
