"""Loading the weights of single experts, and nothing else, from a checkpoint.

Dimension letters: H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open

from cluster.tensors import TORCH_DTYPES
from experts.checkpoint import DTYPES, Checkpoint
from experts.families.base import Part


@dataclass(frozen=True, slots=True)
class GatedFfnWeights:
    """One expert's matrices as the product wants them: ``gate_up`` [2I, H], ``down`` [H, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights."""
        return self.gate_up.nbytes + self.down.nbytes


def load_expert(
    checkpoint: Checkpoint, layer_id: int, expert_id: int, dtype: torch.dtype, device: torch.device
) -> GatedFfnWeights:
    """Read one expert's three matrices, gate and up fused into one contiguous block.

    Only these tensors' bytes are read, or fetched. Gate comes before up, as transformers' fused
    parameter has it, so that results are bitwise those of its eager experts.
    """
    tensors = checkpoint.family.expert_tensors(checkpoint.config, layer_id, expert_id)
    hidden, inner = checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size
    gate_up = torch.empty((2 * inner, hidden), dtype=dtype, device=device)
    gate_up[:inner] = read_part(checkpoint, tensors.gate)
    gate_up[inner:] = read_part(checkpoint, tensors.up)
    down = torch.empty((hidden, inner), dtype=dtype, device=device)
    down.copy_(read_part(checkpoint, tensors.down))
    return GatedFfnWeights(gate_up, down)


def read_part(checkpoint: Checkpoint, part: Part) -> torch.Tensor:
    """Read one matrix or bias of an expert as it is stored, and nothing else of its tensor."""
    tensor = read_tensor(checkpoint, part.name, part.rows)
    if part.stacked:
        tensor = tensor.squeeze(0)
    if part.transposed:
        tensor = tensor.T
    if part.every is not None:
        first, step = part.every
        tensor = tensor[first::step]
    return tensor


def read_tensor(
    checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """Read one tensor as it is stored, from this node's disk or from another node.

    ``rows`` (from, to) reads these of its first axis alone.
    """
    info = checkpoint.tensors[name]
    begin, end = rows or (0, info.shape[0])
    if checkpoint.remote is not None:
        row_bytes = (info.end - info.begin) // info.shape[0]
        data = checkpoint.remote.tensor(name, begin * row_bytes, end * row_bytes)
        flat = torch.frombuffer(data, dtype=TORCH_DTYPES[DTYPES[info.dtype]])
        return flat.view(end - begin, *info.shape[1:])
    with safe_open(str(checkpoint.folder / info.file), framework="pt") as shard:
        if rows is None:
            whole: torch.Tensor = shard.get_tensor(name)
            return whole
        part: torch.Tensor = shard.get_slice(name)[begin:end]
        return part
