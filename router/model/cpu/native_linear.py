"""Linear layers and gated feed-forward layers of the dense part, in native code.

Dimension letters: T tokens, K input size, O output size.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from cluster.native.built import native
from cluster.wire.tensors import to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.ffn import ACTIVATIONS, ffn_of
from experts.compute.panels import FORMATS, pack_matrix


class NativeLinear(nn.Module):
    """``nn.Linear`` on a CPU, from a packed copy of its weight.

    A row's result depends on the row and the weights alone. Sums are float32, rounded once.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Pack copies of ``weight`` [O, K] and ``bias`` [O], neither of which is kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.has_bias = FORMATS[weight.dtype], int(bias is not None)
        # Not a buffer: the layout is native code's, so it can neither be moved nor saved.
        self.packed = to_bytes(pack_matrix(weight, bias))

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
            (self.in_features, self.out_features, *formats),
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
        weights = GatedFfnWeights(gate_up, replaced.down_proj.weight)
        self._compute = ffn_of(weights, ACTIVATIONS[activation])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        return self._compute(rows.flatten(0, -2)).view(rows.shape)


def replace_linears(model: nn.Module, activation: str) -> None:
    """Replace every linear layer of ``model``, and every gated feed-forward layer without biases.

    A head tied to the embedding gets a copy of the weight.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_mlp(child) and activation in ACTIVATIONS:
                setattr(parent, name, NativeMlp(child, activation))
            elif is_linear(child):
                setattr(parent, name, NativeLinear(child.weight, child.bias))


def is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Return whether :class:`NativeLinear` can replace a module."""
    return (
        native is not None
        and type(module) is nn.Linear
        and module.weight.is_cpu
        and module.weight.dtype in FORMATS
    )


def is_mlp(module: nn.Module) -> bool:
    """Return whether :class:`NativeMlp` can replace a module: three layers without a bias."""
    parts = {name: part for name, part in module.named_children() if name.endswith("_proj")}
    return (
        parts.keys() == {"gate_proj", "up_proj", "down_proj"}
        and all(is_linear(part) and part.bias is None for part in parts.values())
        and hasattr(module, "act_fn")
    )
