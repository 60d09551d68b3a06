"""Replaces a model's root mean square norms by native norms with the same bits.

transformers' module makes eight small torch operations. In a step of few tokens their number
decides its time.

Dimension letters: T tokens, H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from cluster.native.built import native
from cluster.wire.tensors import to_bytes

_LANES = 8
"""The lanes of torch's sums; torch sums shorter rows in another order."""
_TRIED_VALUES = 1 << 21
"""The number of values in a trial. A sum in another order changes about one bfloat16 in 200,000, so
a trial of this size shows it."""
_TRIED_AT_ONCE = 1 << 16


class NativeNorm(nn.Module):
    """``weight * bf16(x / sqrt(mean(x ** 2) + eps))`` of bfloat16 on a CPU.

    Root mean square layer normalisation (Zhang and Sennrich 2019, eq. 4), with torch's order of
    sums and torch's roundings.
    """

    def __init__(self, replaced: Any) -> None:
        """Share the weight [H] of ``replaced``, which still computes dtypes other than bfloat16."""
        super().__init__()
        self._replaced = replaced
        self._epsilon = float(replaced.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H], contiguous."""
        if hidden_states.dtype != torch.bfloat16:
            return self._replaced(hidden_states)
        assert native is not None
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        rows, weight = to_bytes(hidden_states), to_bytes(self._replaced.weight)
        native.normalise(rows, weight, self._epsilon, to_bytes(output))
        return output


def replace_norms(model: nn.Module) -> None:
    """Replace every norm of ``model`` whose results :class:`NativeNorm` gives bit for bit.

    Norms with other dtypes, devices or formulas stay, and norms with hooks. All stay where the
    native code is not built.
    """
    # Whether bits are equal depends on a norm's class, size and epsilon, not on its weights, which
    # are random in the trial.
    tried: dict[tuple[type, int, float], bool] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not _is_candidate(child) or isinstance(parent, NativeNorm):
                continue
            norm: Any = child
            key = type(norm), norm.weight.numel(), norm.variance_epsilon
            if key not in tried:
                tried[key] = _same_bits(norm)
            if tried[key]:
                setattr(parent, name, NativeNorm(norm))


def _is_candidate(module: Any) -> bool:
    """Return whether a module has exactly the weight and the epsilon of transformers' norms."""
    parameters = dict(module.named_parameters())
    return (
        native is not None
        and parameters.keys() == {"weight"}
        and not list(module.children())
        and not (module._forward_hooks or module._forward_pre_hooks)
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and module.weight.dim() == 1
        and module.weight.numel() >= _LANES
        and module.weight.dtype == torch.bfloat16
        and module.weight.is_cpu
    )


@torch.inference_mode()
def _same_bits(replaced: Any) -> bool:
    """Compare both norms on random rows and weights; some rows are so small that epsilon counts.

    Rows are tried in pieces, since a router keeps the memory that a trial took.
    """
    size = replaced.weight.numel()
    generator = torch.Generator().manual_seed(0)
    norm = copy.copy(replaced)
    norm._parameters = {"weight": torch.randn(size, generator=generator).to(torch.bfloat16)}
    native_norm = NativeNorm(norm)
    num_rows = -(-_TRIED_VALUES // size)
    scales = torch.logspace(-4, 2, num_rows).unsqueeze(1)
    for piece in scales.split(max(1, _TRIED_AT_ONCE // size)):
        rows = (torch.randn(len(piece), size, generator=generator) * piece).to(torch.bfloat16)
        if not torch.equal(norm(rows), native_norm(rows)):
            return False
    return True
