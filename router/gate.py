"""Asking transformers' own gate again, with some experts out of the question.

Dimension letters: R rows, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ChooseAmong = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps hidden states [R, H] and the allowed experts, bool [R, E], to ids and weights [R, K]."""


class _LogitsMasked(TorchFunctionMode):
    """Within the block, the gate's logits of experts that are not allowed are minus infinity."""

    def __init__(self, allowed: torch.Tensor) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            return result.masked_fill(~self._allowed, -torch.inf)
        return result


def choose_among(
    gate: nn.Module, hidden_states: torch.Tensor, allowed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids and weights [R, K] that the gate gives when only ``allowed`` [R, E] exist.

    The gate is transformers' and computes what it always does, from logits that are minus infinity
    where an expert is not allowed; so its choice falls to the next in line (GShard, Lepikhin et
    al. 2020, section 2.2), and the weights are normalised as the family does. Where fewer than K
    are allowed, the rest of the ids are of experts that are not, and their weights mean nothing.
    """
    with _LogitsMasked(allowed):
        _, weights, ids = gate(hidden_states)
    return ids, weights


def chooser(gate: nn.Module) -> ChooseAmong:
    """Return :func:`choose_among` for one layer's gate."""
    return functools.partial(choose_among, gate)
