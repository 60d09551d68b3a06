"""The gated feed-forward expert by torch: y = down(act(gate x) * up x)  (Shazeer 2020).

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from cluster.device import CPU
from cluster.wire.tensors import from_array, to_array
from experts.checkpoint.expert_weights import GatedFfnWeights, HostWeights
from experts.compute.kernel_classes import log_torch, torch_class

Activation = Callable[[torch.Tensor], torch.Tensor]

# By ``hidden_act``; families.base.ACTIVATION_NAMES has the same names.
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}

_CLAMP, _SWIGLU_ALPHA = 7.0, 1.702


def clamped_ffn(rows: torch.Tensor, weights: GatedFfnWeights[torch.Tensor]) -> torch.Tensor:
    """Apply an expert of GPT-OSS to rows [P, H]; returns [P, H].

    With g = min(gate x, 7) and u = up x within 7 of 0: y = down(g sigmoid(1.702 g) (u + 1)).
    """
    inner = clamped_gate(functional.linear(rows, weights.gate_up, weights.gate_up_bias))
    return functional.linear(inner, weights.down, weights.down_bias)


def clamped_gate(joined: torch.Tensor) -> torch.Tensor:
    """Return GPT-OSS's inner values [P, I] of the products of gate and up, [P, 2I]."""
    gate, up = joined.chunk(2, dim=-1)  # [P, I] each
    gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
    return (up + 1) * (gate * torch.sigmoid(_SWIGLU_ALPHA * gate))


def gate_up_product(joined: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return the inner values [P, I] of the products of gate and up, [P, 2I]."""
    gate, up = joined.chunk(2, dim=-1)  # [P, I] each
    return act(gate) * up


def gated_ffn(
    rows: torch.Tensor, weights: GatedFfnWeights[torch.Tensor], act: Activation
) -> torch.Tensor:
    """Apply one expert to rows [P, H] by torch; returns [P, H] in the rows' dtype."""
    inner = gate_up_product(functional.linear(rows, weights.gate_up), act)
    return functional.linear(inner, weights.down)


class TorchFfn:
    """One expert on the CPU by torch, where native code does not take it."""

    def __init__(self, weights: HostWeights, activation: str) -> None:
        """Keep ``weights``; an expert with biases is GPT-OSS's (:func:`clamped_ffn`)."""
        self._weights, self._act = weights.map(from_array), ACTIVATIONS[activation]
        self.num_bytes = weights.num_bytes
        self.kernel_class = torch_class(CPU, self._weights.down.dtype)
        log_torch(self.kernel_class, *weights.down.shape, weights.down.dtype.name)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Map rows [P, H] to rows [P, H]."""
        with torch.inference_mode():
            return to_array(ffn(from_array(rows), self._weights, self._act))


def ffn(
    rows: torch.Tensor, weights: GatedFfnWeights[torch.Tensor], act: Activation
) -> torch.Tensor:
    """Apply one expert to rows [P, H]: :func:`clamped_ffn` with biases, else :func:`gated_ffn`."""
    if weights.gate_up_bias is not None:
        return clamped_ffn(rows, weights)
    return gated_ffn(rows, weights, act)
