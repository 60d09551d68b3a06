"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): softmax, top-k, renormalise; SwiGLU experts."""

from __future__ import annotations

from functools import partial

from experts.families.base import Config, ExpertTensors, Family, GateSpec, Shapes
from experts.families.common import layer_tensors, outer_tensors, plain_expert, routed_shape


def _expert_tensors(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    prefix = f"model.layers.{layer_id}.block_sparse_moe.experts.{expert_id}"
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return plain_expert(prefix, hidden, inner, ("w1", "w3", "w2"))


def _dense_tensors(config: Config) -> Shapes:
    tensors = outer_tensors(config)
    gate = (config["num_local_experts"], config["hidden_size"])
    for layer_id in range(config["num_hidden_layers"]):
        tensors |= layer_tensors(config, layer_id)
        tensors[f"model.layers.{layer_id}.block_sparse_moe.gate.weight"] = gate
    return tensors


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    experts_class="MixtralExperts",
    expert_shape=partial(routed_shape, num_experts="num_local_experts"),
    expert_tensors=_expert_tensors,
    dense_tensors=_dense_tensors,
    gate=lambda _: GateSpec(renormalises=True, float32=("scores", "weights")),
)
