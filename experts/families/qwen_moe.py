"""What Qwen2-MoE and Qwen3-MoE share: which layers have experts, and what they are called."""

from __future__ import annotations

from experts.families.base import Config, ExpertShape, ExpertTensors, Shapes, size
from experts.families.common import mlp_tensors, plain_expert


def expert_shape(config: Config) -> ExpertShape:
    """Return the experts' sizes; layers may be dense, one by one or all but every n-th."""
    step, dense = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer_id) is not int for layer_id in dense):
        raise ValueError("mlp_only_layers must be a list of integers")
    layers = range(config["num_hidden_layers"])
    return ExpertShape(
        layers=tuple(n for n in layers if n not in dense and (n + 1) % step == 0),
        num_experts=size(config, "num_experts"),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        hidden_size=config["hidden_size"],
        intermediate_size=size(config, "moe_intermediate_size"),
        activation=config.get("hidden_act", "silu"),
    )


def expert_tensors(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    """Return where an expert's matrices lie."""
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    return plain_expert(prefix, config["hidden_size"], config["moe_intermediate_size"])


def mixture_tensors(config: Config, layer_id: int) -> Shapes:
    """Return a layer's gate, or the feed-forward layer that it has in place of a mixture."""
    prefix, hidden = f"model.layers.{layer_id}.mlp", config["hidden_size"]
    if layer_id in expert_shape(config).layers:
        return {f"{prefix}.gate.weight": (config["num_experts"], hidden)}
    return mlp_tensors(prefix, hidden, config["intermediate_size"])
