"""Asking transformers' own gate again, with some experts out of the question.

Dimension letters: R rows, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ChooseAmong = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps hidden states [R, H] and the allowed experts, bool [R, E], to ids and weights [R, K]."""


Gate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""A family's own gate: maps hidden states [R, H] to (logits, weights, ids)."""
_SOFTMAXES = (functional.softmax, torch.softmax, torch.Tensor.softmax)


class _Masked(TorchFunctionMode):
    """Within the block, results of ``functions`` are ``value`` for experts that are not allowed."""

    def __init__(
        self, functions: Sequence[Callable[..., Any]], value: float, allowed: torch.Tensor
    ) -> None:
        super().__init__()
        self._functions = functions
        self._value = value
        self._allowed = allowed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._functions:
            return result.masked_fill(~self._allowed, self._value)
        return result


def choose_among(
    gate: Gate,
    hidden_states: torch.Tensor,
    allowed: torch.Tensor,
    weights_of_all: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids and weights [R, K] that the gate gives when only ``allowed`` [R, E] exist.

    The gate is transformers' and computes what it always does, from logits that are minus infinity
    where an expert is not allowed; so its choice falls to the next in line (GShard, Lepikhin et
    al. 2020, section 2.2), and the weights are normalised as the family does. Where they are shares
    of all experts' (``weights_of_all``), it is the shares that are below all others instead: what
    is left keeps its weight. A correction that is added for the choice alone (DeepSeek-V3) is less
    than any other's, too. Where no more than K are allowed these are chosen, from however many
    groups; the rest of the ids are of experts that are not allowed, and their weights mean nothing.
    """
    gate = _of_any_groups(gate, allowed)
    correction = getattr(gate, "e_score_correction_bias", None)
    if correction is not None and isinstance(gate, nn.Module):
        # Not minus infinity: groups are chosen by sums, and one with a living expert is worth more.
        lowered = torch.where(allowed, correction, correction.min() - 1)
        gate = functools.partial(
            torch.func.functional_call, gate, {"e_score_correction_bias": lowered}
        )
    # Logits without the lost ones would make the others' shares of all larger.
    masked = _Masked(_SOFTMAXES, -1.0, allowed) if weights_of_all else None
    with masked or _Masked((functional.linear,), -torch.inf, allowed):
        _, weights, ids = gate(hidden_states)
    return ids, weights


def _of_any_groups(gate: Any, allowed: torch.Tensor) -> Any:
    """Return the gate; where no more than K are allowed, one that takes them of all its groups."""
    if not hasattr(gate, "topk_group") or (allowed.sum(dim=1) > gate.top_k).any():
        return gate
    gate = copy.copy(gate)
    gate.topk_group = gate.num_group
    return gate


def chooser(gate: Gate, weights_of_all: bool = False) -> ChooseAmong:
    """Return :func:`choose_among` for one layer's gate."""
    return functools.partial(choose_among, gate, weights_of_all=weights_of_all)
