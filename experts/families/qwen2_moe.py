"""Qwen2-MoE (Qwen Team 2024, Qwen1.5-MoE): routed experts, and a shared expert behind a sigmoid."""

from __future__ import annotations

from experts.families import qwen_moe
from experts.families.base import Config, Family, Shapes
from experts.families.common import layer_tensors, mlp_tensors, outer_tensors, softmax_gate


def _dense_tensors(config: Config) -> Shapes:
    tensors, hidden = outer_tensors(config), config["hidden_size"]
    layers = qwen_moe.expert_shape(config).layers
    for layer_id in range(config["num_hidden_layers"]):
        tensors |= layer_tensors(config, layer_id, qkv_bias=config.get("qkv_bias", True))
        tensors |= qwen_moe.mixture_tensors(config, layer_id)
        if layer_id in layers:
            prefix = f"model.layers.{layer_id}.mlp.shared_expert"
            inner = config["shared_expert_intermediate_size"]
            tensors |= mlp_tensors(prefix, hidden, inner)
            tensors[f"{prefix}_gate.weight"] = (1, hidden)
    return tensors


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    experts_class="Qwen2MoeExperts",
    expert_shape=qwen_moe.expert_shape,
    expert_tensors=qwen_moe.expert_tensors,
    dense_tensors=_dense_tensors,
    gate=softmax_gate,
)
