"""The experts of tokens in transformers' models: which they use, and what follows from others.

Dimension letters: T tokens, L MoE layers, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


def renormalised(config: Any, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The weights of Mixtral and Qwen3-MoE: shares of the chosen probabilities."""
    shares = scores.softmax(-1).gather(1, chosen)
    return shares / shares.sum(-1, keepdim=True)


def softmax_of_chosen(config: Any, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The weights of GPT-OSS."""
    return scores.gather(1, chosen).softmax(-1)


def scaled(config: Any, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The weights of DeepSeek-V2, whatever the experts' groups."""
    return scores.softmax(-1).gather(1, chosen) * config.routed_scaling_factor


def sigmoid_shares(config: Any, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The weights of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), whatever the groups."""
    shares = scores.sigmoid().gather(1, chosen)
    return shares / shares.sum(-1, keepdim=True) * config.routed_scaling_factor


WEIGHTS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mixtral": renormalised,
    "qwen3_moe": renormalised,
    "gpt_oss": softmax_of_chosen,
    "deepseek_v2": scaled,
    "deepseek_v3": sigmoid_shares,
}


def _mixtures(model: Any) -> list[tuple[Any, Any]]:
    """Return the block of each MoE layer, in order, and its experts."""
    return [
        (block, block.experts)
        for block in model.modules()
        if hasattr(block, "experts") and isinstance(block.experts, torch.nn.Module)
    ]


@contextmanager
def _hooked(model: Any, hook: Callable[[int, Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    handles = [
        experts.register_forward_pre_hook(lambda _, given, i=i, b=block: hook(i, b, given))
        for i, (block, experts) in enumerate(_mixtures(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def used_by(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Return the experts [T, L, K] that a model uses for each of its tokens."""
    layers: list[torch.Tensor] = []
    with _hooked(model, lambda i, block, given: layers.append(given[1])), torch.inference_mode():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    return torch.stack(layers, dim=1)


def logits_under(model: Any, family: str, token_ids: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, V] of a model whose tokens go to the experts ``rows`` [T, L, K]."""

    def forced(layer: int, block: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, _, given_weights, *others = given
        gate = block.gate if hasattr(block, "gate") else block.router
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = functional.linear(flat, gate.weight, getattr(gate, "bias", None))
        weights = WEIGHTS[family](model.config, rows[:, layer], scores)
        assert weights.shape == given_weights.shape
        return hidden_states, rows[:, layer], weights, *others

    with _hooked(model, forced), torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float()
