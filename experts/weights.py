"""Loading the weights of single experts, and nothing else, from a checkpoint.

Dimension letters: H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open

from experts.checkpoint import Checkpoint


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

    Only these tensors' bytes are read from disk. Gate comes before up, as transformers' fused
    parameter has it, so that results are bitwise those of its eager experts.
    """
    names = checkpoint.family.expert_tensors(layer_id, expert_id)
    hidden, inner = checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size
    gate_up = torch.empty((2 * inner, hidden), dtype=dtype, device=device)
    gate_up[:inner] = _read(checkpoint, names.gate)
    gate_up[inner:] = _read(checkpoint, names.up)
    down = torch.empty((hidden, inner), dtype=dtype, device=device)
    down.copy_(_read(checkpoint, names.down))
    return GatedFfnWeights(gate_up, down)


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    file = checkpoint.folder / checkpoint.tensors[name].file
    with safe_open(str(file), framework="pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
        return tensor
