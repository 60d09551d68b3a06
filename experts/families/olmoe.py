"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): norms over all queries and keys, clipping."""

from __future__ import annotations

from experts.families.base import Config, Family, Shapes, head_sizes
from experts.families.common import (
    layer_tensors,
    mlp_expert,
    outer_tensors,
    routed_shape,
    softmax_gate,
)


def _dense_tensors(config: Config) -> Shapes:
    tensors, bias = outer_tensors(config), config.get("attention_bias", False)
    heads, kv_heads, head_size = head_sizes(config)
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_id}"
        tensors |= layer_tensors(config, layer_id, qkv_bias=bias, output_bias=bias)
        tensors[f"{prefix}.self_attn.q_norm.weight"] = (heads * head_size,)
        tensors[f"{prefix}.self_attn.k_norm.weight"] = (kv_heads * head_size,)
        tensors[f"{prefix}.mlp.gate.weight"] = (config["num_experts"], config["hidden_size"])
    return tensors


OLMOE = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    experts_class="OlmoeExperts",
    expert_shape=routed_shape,
    expert_tensors=mlp_expert,
    dense_tensors=_dense_tensors,
    gate=softmax_gate,
)
