"""Grok-1 in the plainest torch, a token and a head at a time, and random checkpoints of it.

Written from the description of the model alone, and shares nothing with the router's class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoints import VOCAB_SIZE, save_tokenizer

SIZES: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "attn_output_multiplier": 0.35,
    "max_attn_value": 1.5,
    "embedding_multiplier_scale": 6.9,
    "output_multiplier_scale": 0.577,
    "eos_token_id": 0,
}
HEAD = SIZES["hidden_size"] // SIZES["num_attention_heads"]
Weights = dict[str, torch.Tensor]
Seen = list[tuple[torch.Tensor, torch.Tensor]]
"""The keys and values of the tokens so far, in a layer."""


def random_weights(seed: int = 0) -> Weights:
    """Return all tensors by the names of the code that xAI published."""
    torch.manual_seed(seed)
    hidden, inner, heads = (
        SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    kv_heads, experts = SIZES["num_key_value_heads"], SIZES["num_experts"]
    weights = {
        "transformer.in_out_embed.weight": torch.randn(VOCAB_SIZE, hidden) * 0.15,
        "transformer.rms_norm.weight": 1 + 0.2 * torch.randn(hidden),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"transformer.decoder_layer.{layer}"
        for suffix in ("", "_1", "_2", "_3"):
            weights[f"{prefix}.rms_norm{suffix}.weight"] = 1 + 0.2 * torch.randn(hidden)
        for name, rows in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
            matrix = torch.randn(rows * HEAD, hidden) * 0.15
            weights[f"{prefix}.multi_head_attention.{name}.weight"] = matrix
        output = torch.randn(hidden, heads * HEAD) * 0.15
        weights[f"{prefix}.multi_head_attention.linear.weight"] = output
        weights[f"{prefix}.router.weight"] = torch.randn(experts, hidden) * 0.3
        for expert in range(experts):
            for name in ("linear", "linear_v"):
                matrix = torch.randn(inner, hidden) * 0.15
                weights[f"{prefix}.moe.{expert}.{name}.weight"] = matrix
            down = torch.randn(hidden, inner) * 0.15
            weights[f"{prefix}.moe.{expert}.linear_1.weight"] = down
    return weights


_LLAMA_PARTS = [
    ("multi_head_attention.query", "attn.q_proj"),
    ("multi_head_attention.key", "attn.k_proj"),
    ("multi_head_attention.value", "attn.v_proj"),
    ("multi_head_attention.linear", "attn.o_proj"),
    ("router", "moe_block.gate"),
    ("moe.", "moe_block.experts."),
    ("rms_norm_1.weight", "post_attn_norm.scale"),
    ("rms_norm_2.weight", "pre_moe_norm.scale"),
    ("rms_norm_3.weight", "post_moe_norm.scale"),
    ("rms_norm.weight", "pre_attn_norm.scale"),
]


def llama_name(name: str) -> str:
    """Return what the other public conversion calls a tensor."""
    if not name.startswith("transformer.decoder_layer."):
        outer = {"in_out_embed.weight": "embed_tokens.weight", "rms_norm.weight": "norm.scale"}
        return "model." + outer[name.removeprefix("transformer.")]
    layer, part = name.removeprefix("transformer.decoder_layer.").split(".", 1)
    old, new = next(pair for pair in _LLAMA_PARTS if part.startswith(pair[0]))
    return f"model.layers.{layer}.{part.replace(old, new, 1)}"


def save_grok(
    folder: Path, style: str = "grok-1", dtype: torch.dtype = torch.float32, **changes: Any
) -> Weights:
    """Save a random checkpoint in one of the two styles; returns its weights by xAI's names."""
    weights = random_weights()
    names = {name: name if style == "grok" else llama_name(name) for name in weights}
    stored = {names[name]: tensor.to(dtype) for name, tensor in weights.items()}
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**SIZES, "model_type": style, **changes}))
    save_tokenizer(folder)
    return weights


def normed(vector: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return vector / torch.sqrt((vector * vector).mean() + 1e-5) * weight


def turned(head: torch.Tensor, position: int) -> torch.Tensor:
    half = HEAD // 2
    result = head.clone()
    for i in range(half):
        angle = position / 10000 ** (2 * i / HEAD)
        a, b = head[i], head[half + i]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[half + i] = b * math.cos(angle) + a * math.sin(angle)
    return result


def attention(weights: Weights, prefix: str, vector: torch.Tensor, seen: Seen) -> torch.Tensor:
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    cap, scale = SIZES["max_attn_value"], SIZES["attn_output_multiplier"]
    position = len(seen)
    query, key, value = (
        (weights[f"{prefix}.{name}.weight"] @ vector).view(-1, HEAD)
        for name in ("query", "key", "value")
    )
    seen.append((torch.stack([turned(head, position) for head in key]), value))
    parts = []
    for head in range(heads):
        of = head * kv_heads // heads
        asked = turned(query[head], position)
        scores = torch.stack([asked @ key[of] for key, _ in seen]) * scale
        shares = (cap * torch.tanh(scores / cap)).softmax(0)
        parts.append(sum(share * value[of] for share, (_, value) in zip(shares, seen, strict=True)))
    return weights[f"{prefix}.linear.weight"] @ torch.cat(parts)


def mixture(weights: Weights, prefix: str, vector: torch.Tensor) -> torch.Tensor:
    shares = (weights[f"{prefix}.router.weight"] @ vector).softmax(0)
    output = torch.zeros_like(vector)
    for expert in shares.argsort(descending=True)[: SIZES["num_experts_per_tok"]].tolist():
        linear, linear_v, linear_1 = (
            weights[f"{prefix}.moe.{expert}.{name}.weight"]
            for name in ("linear", "linear_v", "linear_1")
        )
        x = linear @ vector
        gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        output += shares[expert] * (linear_1 @ (gelu * (linear_v @ vector)))
    return output


class Grok:
    """The model after some tokens, whose keys and values it keeps."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._seen: list[Seen] = [[] for _ in range(SIZES["num_hidden_layers"])]

    @torch.inference_mode()
    def add(self, token_id: int) -> torch.Tensor:
        """Return the logits after one more token, [V]."""
        weights = self._weights
        table = weights["transformer.in_out_embed.weight"]
        hidden = table[token_id] * SIZES["embedding_multiplier_scale"]
        for layer, seen in enumerate(self._seen):
            prefix = f"transformer.decoder_layer.{layer}"
            first, second, third, fourth = (
                weights[f"{prefix}.rms_norm{suffix}.weight"] for suffix in ("", "_1", "_2", "_3")
            )
            attended = attention(
                weights, f"{prefix}.multi_head_attention", normed(hidden, first), seen
            )
            hidden = hidden + normed(attended, second)
            hidden = hidden + normed(mixture(weights, prefix, normed(hidden, third)), fourth)
        last = normed(hidden, weights["transformer.rms_norm.weight"])
        return table @ last * SIZES["output_multiplier_scale"]


def all_logits(weights: Weights, token_ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after each token, [T, V]."""
    model = Grok(weights)
    return torch.stack([model.add(token_id) for token_id in token_ids])


def logits_of(weights: Weights, token_ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after the last token, [V]."""
    return all_logits(weights, token_ids)[-1]


def greedy_tokens(weights: Weights, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens that follow a prompt."""
    model = Grok(weights)
    for token_id in prompt:
        logits = model.add(token_id)
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(model.add(found[-1]).argmax()))
    return found
