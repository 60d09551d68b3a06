"""The common part of Qwen2-MoE and Qwen3-MoE: the layers with experts, and the tensors' names."""

from __future__ import annotations

from functools import partial

from experts.families.base import Config, ExpertShape, Shapes, size
from experts.families.common import mlp_expert, mlp_tensors, routed_shape


def expert_shape(config: Config) -> ExpertShape:
    """Return the experts' sizes; the configuration has a list of dense layers, and a step."""
    step, dense = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer_id) is not int for layer_id in dense):
        raise ValueError("mlp_only_layers must be a list of integers")
    layers = range(config["num_hidden_layers"])
    return routed_shape(
        config,
        intermediate_size="moe_intermediate_size",
        layers=(n for n in layers if n not in dense and (n + 1) % step == 0),
    )


expert_tensors = partial(mlp_expert, intermediate_size="moe_intermediate_size")


def mixture_tensors(config: Config, layer_id: int) -> Shapes:
    """Return a layer's gate, or the feed-forward layer of a layer without experts."""
    prefix, hidden = f"model.layers.{layer_id}.mlp", config["hidden_size"]
    if layer_id in expert_shape(config).layers:
        return {f"{prefix}.gate.weight": (config["num_experts"], hidden)}
    return mlp_tensors(prefix, hidden, config["intermediate_size"])
