"""Modules of the dense part in native code: linear layers, gated feed-forward layers, norms.

Dimension letters: T tokens, H hidden size, K input size, O output size.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from cluster.native import native
from cluster.wire.tensors import dtype_name, from_bytes, to_array, to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.native_ffn import MAX_SIZE, NATIVE_ACTIVATIONS, NativeFfn, compute_native
from experts.compute.panels import pack_matrix
from router.model.cpu.formats import FORMATS

ROOT_MEAN_SQUARE, LAYER_NORM = 1, 2
"""The number of each kind of norm in native code."""


class NativeLinear(nn.Module):
    """``nn.Linear`` on a CPU, from a packed copy of its weight.

    A row's result depends only on the row and the weights. Sums are float32, rounded once.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Pack copies of ``weight`` [O, K] and ``bias`` [O], neither of which is kept.

        A ``weight`` [M, O, K] has a matrix for each of the first axis of rows [M, ..., K].
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape[-2:]
        self.format, self.has_bias = FORMATS[weight.dtype], int(bias is not None)
        matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
        self._count = len(matrices)
        # Not a buffer: the layout is native code's, so it can neither be moved nor saved.
        own_bias = None if bias is None else to_array(bias)
        packed = [pack_matrix(to_array(matrix), own_bias) for matrix in matrices]
        self.packed = (packed[0] if len(packed) == 1 else np.concatenate(packed)).data

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [..., K] to [..., O] in the rows' dtype."""
        return self.product(rows, rows.dtype)

    def product(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map [..., K] to [..., O] in ``dtype``."""
        assert native is not None
        output = rows.new_empty((*rows.shape[:-1], self.out_features), dtype=dtype)
        formats = self.format, FORMATS[rows.dtype], FORMATS[dtype], self.has_bias
        native.linear(
            to_bytes(rows),
            self.packed,
            to_bytes(output),
            (self._count, self.in_features, self.out_features, *formats),
            torch.get_num_threads(),
            None,
        )
        return output


class NativeMlp(nn.Module):
    """A dense gated feed-forward layer or a shared expert, computed as experts are."""

    def __init__(self, replaced: Any, activation: str) -> None:
        """Pack copies of the weights of ``replaced``; ``activation`` is its ``hidden_act``."""
        super().__init__()
        gate_up = torch.cat((replaced.gate_proj.weight, replaced.up_proj.weight))
        weights = GatedFfnWeights(to_array(gate_up), to_array(replaced.down_proj.weight))
        self._ffn = NativeFfn(weights, activation, torch.get_num_threads())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        num_rows, row_shape = rows.shape[:-1].numel(), rows.shape[-1:]
        output = compute_native([self._ffn], (num_rows,), to_bytes(rows))
        assert output is not None
        return from_bytes(output, dtype_name(rows.dtype), num_rows, row_shape).view(rows.shape)


class NativeNorm(nn.Module):
    """``weight * x / sqrt(mean(x ** 2) + eps)`` (Zhang and Sennrich 2019, eq. 4), or a layer norm.

    Everything is float32 and rounded once; sums have one order.
    """

    def __init__(self, replaced: Any) -> None:
        """Copy the weight [H] of ``replaced``."""
        super().__init__()
        self.kind = LAYER_NORM if type(replaced) is nn.LayerNorm else ROOT_MEAN_SQUARE
        self.epsilon = float(_epsilon_of(replaced) or 0.0)
        self._weight = next(iter(replaced.parameters())).detach().float().contiguous()
        self.size = self._weight.numel()
        self.weight = to_bytes(self._weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H], contiguous."""
        assert native is not None
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        number = FORMATS[rows.dtype]
        sizes = self.size, number, number, self.kind
        native.normalise(to_bytes(rows), self.weight, to_bytes(output), sizes, self.epsilon)
        return output


def replace_modules(model: nn.Module, activation: str) -> None:
    """Replace every module of ``model`` that a native module can take the place of.

    These are linear layers, norms with a weight and nothing else, and gated feed-forward layers
    with ``activation`` and without biases. A head tied to the embedding gets a copy of the weight.
    A replaced module is free before the children of the next parent are packed.
    """
    for name, child in list(model.named_children()):
        if is_norm(child):
            setattr(model, name, NativeNorm(child))
        elif is_mlp(child) and activation in NATIVE_ACTIVATIONS:
            setattr(model, name, NativeMlp(child, activation))
        elif is_linear(child):
            setattr(model, name, NativeLinear(child.weight, child.bias))
        else:
            replace_modules(child, activation)


def is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Return whether :class:`NativeLinear` can replace a module."""
    return type(module) is nn.Linear and can_multiply(module.weight)


def can_multiply(weight: torch.Tensor) -> bool:
    """Return whether native code takes a weight."""
    is_taken = weight.is_cpu and weight.dtype in FORMATS and max(weight.shape) <= MAX_SIZE
    return native is not None and is_taken


def is_mlp(module: nn.Module) -> bool:
    """Return whether :class:`NativeMlp` can replace a module: three layers without a bias."""
    parts = {name: part for name, part in module.named_children() if name.endswith("_proj")}
    return (
        parts.keys() == {"gate_proj", "up_proj", "down_proj"}
        and all(is_linear(part) and part.bias is None for part in parts.values())
        and hasattr(module, "act_fn")
    )


def is_norm(module: nn.Module) -> bool:
    """Return whether :class:`NativeNorm` can replace a module."""
    parameters = list(module.parameters())
    is_known = type(module) is nn.LayerNorm or type(module).__name__.endswith(
        ("RMSNorm", "GrokNorm")
    )
    return (
        native is not None
        and is_known
        and len(parameters) == 1
        and parameters[0].dim() == 1
        and parameters[0].is_cpu
        and _epsilon_of(module) is not None
    )


def _epsilon_of(module: Any) -> float | None:
    names = "variance_epsilon", "eps"
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
