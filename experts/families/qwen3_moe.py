"""Qwen3-MoE (Yang et al. 2025, arXiv 2505.09388): a norm on each head's queries and keys."""

from __future__ import annotations

from experts.families import qwen_moe
from experts.families.base import Config, Family, Shapes, head_sizes
from experts.families.common import layer_tensors, outer_tensors, softmax_gate


def _usual(config: Config) -> Config:
    # transformers saves the number of experts under another key than the published one.
    count = config.get("num_experts", config.get("num_local_experts"))
    return {**config, "num_experts": count}


def _dense_tensors(config: Config) -> Shapes:
    tensors, bias = outer_tensors(config), config.get("attention_bias", False)
    _, _, head_size = head_sizes(config)
    for layer_id in range(config["num_hidden_layers"]):
        tensors |= layer_tensors(config, layer_id, qkv_bias=bias, output_bias=bias)
        tensors |= qwen_moe.mixture_tensors(config, layer_id)
        for norm in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer_id}.self_attn.{norm}.weight"] = (head_size,)
    return tensors


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    experts_class="Qwen3MoeExperts",
    expert_shape=qwen_moe.expert_shape,
    expert_tensors=qwen_moe.expert_tensors,
    dense_tensors=_dense_tensors,
    gate=softmax_gate,
    usual=_usual,
)
