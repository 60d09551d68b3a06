"""The gated feed-forward expert: y = down(act(gate x) * up x)  (Shazeer 2020).

Dimension letters: P rows of one expert, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.native_ffn import NATIVE_ACTIVATIONS, GatedFfn, NativeFfn, can_compute

Activation = Callable[[torch.Tensor], torch.Tensor]

# By ``hidden_act``; families.base.ACTIVATION_NAMES has the same names.
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
_NAMES = {act: name for name, act in ACTIVATIONS.items()}

_CLAMP, _SWIGLU_ALPHA = 7.0, 1.702


def clamped_ffn(rows: torch.Tensor, weights: GatedFfnWeights) -> torch.Tensor:
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


def gated_ffn(rows: torch.Tensor, weights: GatedFfnWeights, act: Activation) -> torch.Tensor:
    """Apply one expert to rows [P, H] by torch; returns [P, H] in the rows' dtype."""
    inner = gate_up_product(functional.linear(rows, weights.gate_up), act)
    return functional.linear(inner, weights.down)


def ffn_of(weights: GatedFfnWeights, act: Activation) -> GatedFfn:
    """Return the fastest function for an expert.

    It is native (:class:`NativeFfn`), or torch's where there is no native code. An expert with
    biases is GPT-OSS's (:func:`clamped_ffn`), with its own activation. The function may hold a
    rearranged copy of the weights, so the caller should drop ``weights``.
    """
    is_clamped = weights.gate_up_bias is not None
    name = NATIVE_ACTIVATIONS[0] if is_clamped else _NAMES.get(act)
    if name is not None and can_compute(weights):
        return NativeFfn(weights, name)
    if is_clamped:
        return partial(clamped_ffn, weights=weights)
    return partial(gated_ffn, weights=weights, act=act)
