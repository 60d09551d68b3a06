"""Norms of the dense part in native code: root mean square norms, and layer norms without a bias.

Dimension letters: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cluster.native.built import native
from cluster.wire.tensors import to_bytes
from experts.compute.panels import FORMATS

ROOT_MEAN_SQUARE, LAYER_NORM = 1, 2
"""The number of each kind of norm in native code."""


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


def replace_norms(model: nn.Module) -> None:
    """Replace every norm of ``model`` that has a weight and nothing else."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_norm(child):
                setattr(parent, name, NativeNorm(child))


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
