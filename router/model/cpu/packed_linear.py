"""Replaces a model's linear layers by packed layers with the same bits.

In bf16, oneDNN rearranges the whole weight in every call of ``torch.nn.functional.linear``, which
takes as long as the product of a few rows. Here the weight is rearranged once, when it is loaded.

Dimension letters: T tokens, I input size, O output size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional

Product = Callable[[torch.Tensor], torch.Tensor]
"""Maps rows [..., T, I] to [..., T, O]."""
_CHECKED_ROWS = (1, 48)

_product = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """``nn.Linear`` without a bias, in bf16 on a CPU, from a rearranged copy of its weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Rearrange a copy of ``weight`` [O, I]; ``weight`` itself is not kept."""
        super().__init__()
        # Not a buffer: oneDNN's layout is opaque, so it can neither be moved nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [..., T, I] to [..., T, O]."""
        output: torch.Tensor = _product(hidden_states, self._packed, None, "none", [], "")
        return output


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of ``model`` whose packed layer gives the same bits.

    Layers with a bias, another dtype or another device stay, and all layers on a processor for
    which oneDNN has no bf16. The weight of a head tied to the embedding is copied.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_packable(child):
                packed = PackedLinear(child.weight)
                if _same_bits(child, packed, child.in_features):
                    setattr(parent, name, packed)


def product_with(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """Return the product with ``weight`` [O, I] plus ``bias`` [O]; packed where bits are equal."""
    plain = partial(functional.linear, weight=weight, bias=bias)
    if bias is None and _can_pack(weight):
        packed = PackedLinear(weight)
        if _same_bits(plain, packed, weight.shape[1]):
            return packed.forward
    return plain


def is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear layer that :class:`PackedLinear` can replace."""
    return type(module) is nn.Linear and module.bias is None and _can_pack(module.weight)


def _can_pack(weight: torch.Tensor) -> bool:
    """Return whether oneDNN has a layout for a weight: bf16, on a CPU that supports it."""
    return (
        weight.is_cpu
        and weight.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _same_bits(plain: Product, packed: Product, input_size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    samples = (
        torch.randn(num_rows, input_size, generator=generator).to(torch.bfloat16)
        for num_rows in _CHECKED_ROWS
    )
    return all(torch.equal(plain(rows), packed(rows)) for rows in samples)
