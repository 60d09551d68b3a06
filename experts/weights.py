"""Loading the weights of single experts, and nothing else, from a checkpoint.

Dimension letters: H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from cluster.tensors import TORCH_DTYPES
from experts.checkpoint import DTYPES, Checkpoint


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
    names = checkpoint.family.expert_tensors(layer_id, expert_id)
    hidden, inner = checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size
    gate_up = torch.empty((2 * inner, hidden), dtype=dtype, device=device)
    gate_up[:inner] = read_tensor(checkpoint, names.gate)
    gate_up[inner:] = read_tensor(checkpoint, names.up)
    down = torch.empty((hidden, inner), dtype=dtype, device=device)
    down.copy_(read_tensor(checkpoint, names.down))
    return GatedFfnWeights(gate_up, down)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one tensor as it is stored, from this node's disk or from another node.

    Raises :class:`CheckpointError` when its file has changed since the checkpoint was opened.
    """
    info = checkpoint.tensors[name]
    if checkpoint.remote is not None:
        flat = torch.frombuffer(
            checkpoint.remote.tensor(name), dtype=TORCH_DTYPES[DTYPES[info.dtype]]
        )
        return flat.view(info.shape)
    file = checkpoint.folder / info.file
    try:
        with safe_open(str(file), framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {name} cannot be read: {error}", str(file)) from None
