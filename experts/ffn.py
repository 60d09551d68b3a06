"""The feed-forward expert of Mixtral and its kin: y = down(act(gate x) * up x)  (Shazeer 2020).

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from experts.weights import GatedFfnWeights

Activation = Callable[[torch.Tensor], torch.Tensor]

# By hidden_act; families.base.ACTIVATION_NAMES are the same ones.
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gated_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Apply one expert to rows [P, H]; returns [P, H] in the rows' dtype."""
    gate, up = functional.linear(rows, weights.gate_up).chunk(2, dim=-1)  # [P, I] each
    return functional.linear(act(gate) * up, weights.down)
