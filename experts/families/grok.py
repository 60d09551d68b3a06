"""Grok-1 (xAI 2024, github.com/xai-org/grok-1), with both published sets of names.

The original weights are not safetensors. Two conversions to safetensors differ in names alone:
``grok-1`` has Llama's names, ``grok`` those of xAI's own code.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from experts.families.base import Config, ExpertTensors, Family, GateSpec, Shapes
from experts.families.common import attention_tensors, plain_expert, routed_shape

_DEFAULTS = {
    "attn_output_multiplier": 0.08838834764831845,
    "max_attn_value": 30.0,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
"""The multipliers and limits in xAI's code."""

_NAMES_OF_XAI = {
    "model.embed_tokens.weight": "transformer.in_out_embed.weight",
    "model.norm.scale": "transformer.rms_norm.weight",
    "attn.q_proj.weight": "multi_head_attention.query.weight",
    "attn.k_proj.weight": "multi_head_attention.key.weight",
    "attn.v_proj.weight": "multi_head_attention.value.weight",
    "attn.o_proj.weight": "multi_head_attention.linear.weight",
    "moe_block.gate.weight": "router.weight",
    "pre_attn_norm.scale": "rms_norm.weight",
    "post_attn_norm.scale": "rms_norm_1.weight",
    "pre_moe_norm.scale": "rms_norm_2.weight",
    "post_moe_norm.scale": "rms_norm_3.weight",
}
_EXPERTS = "moe_block.experts."


def _usual(config: Config) -> Config:
    count = config.get("num_experts", config.get("num_local_experts"))
    given = {key: value for key, value in config.items() if value is not None}
    for key, default in _DEFAULTS.items():
        value = given.get(key, default)
        if not isinstance(value, (int, float)) or not (value > 0 or isinstance(value, bool)):
            raise ValueError(f"{key} must be a positive number (given: {value!r:.40})")
    return _DEFAULTS | given | {"num_experts": count}


def _experts(prefix: str, config: Config, expert_id: int) -> ExpertTensors:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return plain_expert(f"{prefix}.{expert_id}", hidden, inner, ("linear", "linear_v", "linear_1"))


def _expert_tensors(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    return _experts(f"model.layers.{layer_id}.moe_block.experts", config, expert_id)


def _expert_tensors_of_xai(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    return _experts(f"transformer.decoder_layer.{layer_id}.moe", config, expert_id)


def _dense_tensors(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.scale": (hidden,)}
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_id}"
        tensors |= attention_tensors(config, f"{prefix}.attn")
        tensors[f"{prefix}.moe_block.gate.weight"] = (config["num_experts"], hidden)
        for norm in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            tensors[f"{prefix}.{norm}.scale"] = (hidden,)
    return tensors


def name_of_xai(name: str) -> str:
    """Return a tensor's name in xAI's code; raises ``KeyError`` for an unknown part of a layer."""
    if not name.startswith("model.layers."):
        return _NAMES_OF_XAI.get(name, name)
    _, _, layer_id, part = name.split(".", 3)
    if part.startswith(_EXPERTS):
        part = f"moe.{part.removeprefix(_EXPERTS)}"
    else:
        part = _NAMES_OF_XAI[part]
    return f"transformer.decoder_layer.{layer_id}.{part}"


def _dense_tensors_of_xai(config: Config) -> Shapes:
    return {name_of_xai(name): shape for name, shape in _dense_tensors(config).items()}


def _module_names(config: Config) -> dict[str, str]:
    return {name_of_xai(name): name for name in _dense_tensors(config)}


GROK_1 = Family(
    model_type="grok-1",
    architectures=("Grok1ModelForCausalLM", "Grok1ForCausalLM", "GrokForCausalLM"),
    experts_class=None,
    expert_shape=partial(routed_shape, activation="gelu_pytorch_tanh"),
    expert_tensors=_expert_tensors,
    dense_tensors=_dense_tensors,
    gate=lambda _: GateSpec(),
    usual=_usual,
    caps_scores=True,
    options={
        "hidden_act": ("gelu", "gelu_pytorch_tanh"),
        "residual_moe": (False,),
        "router_logit_softcapping": (0,),
        "tie_word_embeddings": (True,),
    },
)

GROK_1_OF_XAI = replace(
    GROK_1,
    model_type="grok",
    expert_tensors=_expert_tensors_of_xai,
    dense_tensors=_dense_tensors_of_xai,
    module_names=_module_names,
)
