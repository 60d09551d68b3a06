"""Loading the weights of single experts from a checkpoint.

Dimension letters: H hidden size, I intermediate size.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.dequantize import dequantize_fp8, dequantized
from experts.checkpoint.quantization import FP8
from experts.checkpoint.stored import read_into
from experts.families.base import Part

_TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class GatedFfnWeights:
    """One expert's matrices: ``gate_up`` [2I, H], ``down`` [H, I].

    Families with biases also have ``gate_up_bias`` [2I] and ``down_bias`` [H].
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights."""
        return sum(tensor.nbytes for tensor in self._parts())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GatedFfnWeights:
        """Return the weights with each tensor changed."""
        return GatedFfnWeights(*map(change, self._parts()))

    def copy_(self, others: GatedFfnWeights) -> None:
        """Overwrite the weights by others of the same shapes."""
        for own, other in zip(self._parts(), others._parts(), strict=True):
            own.copy_(other)

    def _parts(self) -> list[torch.Tensor]:
        parts = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return [part for part in parts if part is not None]


def expert_shape(
    checkpoint: Checkpoint, layer_id: int, expert_id: int, dtype: torch.dtype
) -> GatedFfnWeights:
    """Return one expert's weights without memory (``meta``); reads nothing of the files."""
    tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)

    def joined(*parts: Part) -> torch.Tensor:
        num_rows, *columns = _shape_of(parts[0])
        return torch.empty((len(parts) * num_rows, *columns), dtype=dtype, device="meta")

    weights = GatedFfnWeights(joined(tensors.gate, tensors.up), joined(tensors.down))
    if not tensors.biases:
        return weights
    gate, up, down = tensors.biases
    return replace(weights, gate_up_bias=joined(gate, up), down_bias=joined(down))


def load_expert(
    checkpoint: Checkpoint, layer_id: int, expert_id: int, dtype: torch.dtype, device: torch.device
) -> GatedFfnWeights:
    """Read one expert into new tensors; see :func:`read_expert`."""
    shape = expert_shape(checkpoint, layer_id, expert_id, dtype)
    # Allocated first: in the heap, freed buffers then lie above the weights.
    weights = shape.map(lambda part: _empty(part.shape, dtype, device))
    read_expert(checkpoint, layer_id, expert_id, weights)
    return weights


def read_expert(
    checkpoint: Checkpoint, layer_id: int, expert_id: int, into: GatedFfnWeights
) -> None:
    """Read one expert's three matrices, gate and up fused into one contiguous block.

    ``into`` has their shapes, and the dtype they get, on any device. Only the bytes of this expert
    are read or fetched, each once. Beside the weights at most one stored matrix is in memory, and
    its dequantised values. Gate comes before up, as in transformers' fused parameter, so that
    results have the bits of its eager experts.
    """
    tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)
    _read(checkpoint, (tensors.gate, tensors.up), into.gate_up)
    _read(checkpoint, (tensors.down,), into.down)
    if tensors.biases:
        assert into.gate_up_bias is not None
        assert into.down_bias is not None
        gate, up, down = tensors.biases
        _read(checkpoint, (gate, up), into.gate_up_bias)
        _read(checkpoint, (down,), into.down_bias)


def _read(checkpoint: Checkpoint, parts: Sequence[Part], whole: torch.Tensor) -> None:
    """Read parts of equal shapes, one after the other by rows; a stored matrix may contain all.

    A part that is stored in its final form is read into its place, and FP8 is dequantised into it.
    """
    num_rows, dtype = len(whole) // len(parts), whole.dtype
    stored, stored_rows = torch.empty(0), None
    for part, place in zip(parts, whole.split(num_rows), strict=True):
        if _is_stored_like(checkpoint, part, place):
            _read_stored(checkpoint, part.name, part.rows, place)
            continue
        if _is_fp8_in_place(checkpoint, part, place):
            packed, rows = checkpoint.packed[part.name], part.rows or (0, part.shape[0])
            dequantize_fp8(packed, partial(_read_stored, checkpoint), rows, place)
            continue
        if (part.name, part.rows) != stored_rows:
            del stored  # before the next matrix takes memory
            stored = read_tensor(checkpoint, part.name, dtype, part.rows)
            stored_rows = (part.name, part.rows)
        place.copy_(_part_of(stored, part))


def _shape_of(part: Part) -> torch.Size:
    """Return the shape of a part."""
    begin, end = part.rows or (0, part.shape[0])
    return _part_of(torch.empty((end - begin, *part.shape[1:]), device="meta"), part).shape


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return paged(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _is_rearranged(part: Part) -> bool:
    return part.transposed or part.every is not None


def _is_fp8_in_place(checkpoint: Checkpoint, part: Part, place: torch.Tensor) -> bool:
    """Return whether a part is FP8 whose codes are in the order of its numbers in ``place``."""
    packed = checkpoint.packed.get(part.name)
    if packed is None or packed.method != FP8 or part.stacked:
        return False
    return place.is_cpu and not _is_rearranged(part)


def _is_stored_like(checkpoint: Checkpoint, part: Part, place: torch.Tensor) -> bool:
    """Return whether the stored bytes of a part are those of ``place``."""
    if part.name in checkpoint.packed or _is_rearranged(part):
        return False
    stored_dtype = _TORCH_DTYPES[checkpoint.tensors[part.name].dtype]
    return place.is_cpu and place.dtype == stored_dtype


def _part_of(stored: torch.Tensor, part: Part) -> torch.Tensor:
    """Return a part, out of the rows that were read for it."""
    tensor = stored.squeeze(0) if part.stacked else stored
    if part.transposed:
        tensor = tensor.T
    if part.every is not None:
        first, step = part.every
        tensor = tensor[first::step]
    return tensor


def read_tensor(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Read one tensor of the model, from this node's disk or from another node.

    The result has the stored dtype, or ``dtype`` for a quantised tensor. ``rows`` (begin, end)
    selects rows of the first axis. Raises :class:`CheckpointError` when the file has changed since
    the checkpoint was opened.
    """
    packed = checkpoint.packed.get(name)
    if packed is None:
        return _read_stored(checkpoint, name, rows)
    return dequantized(packed, partial(_read_stored, checkpoint), rows, dtype)


def _read_stored(
    checkpoint: Checkpoint,
    name: str,
    rows: tuple[int, int] | None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read rows of a stored tensor into ``into`` or into a new tensor; returns this tensor."""
    info = checkpoint.tensors[name]
    begin, end = rows or (0, info.shape[0])
    row_bytes = (info.end - info.begin) // info.shape[0]
    if into is None:
        into = torch.empty((end - begin, *info.shape[1:]), dtype=_TORCH_DTYPES[info.dtype])
    flat = into.view(-1).view(torch.uint8)
    if checkpoint.remote is not None:
        data = checkpoint.remote.tensor(name, begin * row_bytes, end * row_bytes)
        flat.copy_(torch.frombuffer(data, dtype=torch.uint8))
    else:
        read_into(checkpoint, name, begin * row_bytes, flat.numpy().data)
    return into


MIN_PAGED_BYTES = 64 << 10
"""Smaller tensors come from the heap: a tensor with its own pages wastes half a page."""

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def paged(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an empty CPU tensor in pages of its own, which are freed with the tensor.

    In the heap, weights would lie between the buffers of their loading. An aligned block does not
    fit into the hole that a freed buffer of the same size leaves. So experts with small matrices
    would take up to half as much memory again. A lower mmap threshold of ``malloc`` does not help:
    every product would need fresh pages.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_PAGED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=_FLAGS), dtype=dtype).view(shape)
