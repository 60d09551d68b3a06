"""DBRX (Databricks 2024): sixteen stacked experts, clipped attention, LayerNorms without a bias.

Dimension letters: E experts of a layer, I intermediate size, H hidden size.
"""

from __future__ import annotations

import math

from experts.families.base import (
    Config,
    ExpertShape,
    ExpertTensors,
    Family,
    GateSpec,
    Part,
    Shapes,
    head_sizes,
    size,
)
from experts.families.common import routed_shape

_OWN_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_ROPE_THETA = 10000.0


def _usual(config: Config) -> Config:
    attention, experts = config.get("attn_config") or {}, config.get("ffn_config") or {}
    for key, part in (("attn_config", attention), ("ffn_config", experts)):
        if not isinstance(part, dict):
            raise ValueError(f"{key} must be a mapping")
    return {
        **config,
        "attn_config": attention,
        "ffn_config": experts,
        "hidden_size": size(config, "d_model"),
        "num_hidden_layers": size(config, "n_layers"),
        "num_attention_heads": size(config, "n_heads"),
        "num_key_value_heads": size(attention, "kv_n_heads"),
        "max_position_embeddings": size(config, "max_seq_len"),
        "intermediate_size": size(experts, "ffn_hidden_size"),
        "num_local_experts": size(experts, "moe_num_experts"),
        "num_experts_per_tok": size(experts, "moe_top_k"),
    }


def _transformers_config(config: Config) -> Config:
    """Return a configuration without three faults of transformers' class.

    The class refuses an integer exponent, never reads ``rope_theta``, and fails without a
    ``clip_qkv``.
    """
    attention, experts = dict(config["attn_config"]), dict(config["ffn_config"])
    experts["moe_normalize_expert_weights"] = _norm_exponent(config)
    theta = float(attention.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA)
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": theta}
    attention["rope_theta"] = rope["rope_theta"]
    if attention.get("clip_qkv") is None:
        attention["clip_qkv"] = math.inf
    fixed = {"attn_config": attention, "ffn_config": experts, "rope_parameters": rope}
    return {key: value for key, value in config.items() if key not in _OWN_KEYS} | fixed


def _expert_shape(config: Config) -> ExpertShape:
    activation = config["ffn_config"].get("ffn_act_fn") or {}
    name = str(activation.get("name", "silu"))
    return routed_shape(config, num_experts="num_local_experts", activation=name)


def _expert_tensors(config: Config, layer_id: int, expert_id: int) -> ExpertTensors:
    prefix = f"transformer.blocks.{layer_id}.ffn.experts.mlp"
    inner, hidden = config["intermediate_size"], config["hidden_size"]
    shape = (config["num_local_experts"] * inner, hidden)
    rows = (expert_id * inner, (expert_id + 1) * inner)
    return ExpertTensors(
        gate=Part(f"{prefix}.w1", shape, rows),
        up=Part(f"{prefix}.v1", shape, rows),
        down=Part(f"{prefix}.w2", shape, rows, transposed=True),
    )


def _dense_tensors(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    heads, kv_heads, head_size = head_sizes(config)
    tensors: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.norm_f.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"transformer.blocks.{layer_id}"
        tensors |= {
            f"{prefix}.norm_attn_norm.norm_1.weight": (hidden,),
            f"{prefix}.norm_attn_norm.norm_2.weight": (hidden,),
            f"{prefix}.norm_attn_norm.attn.Wqkv.weight": (
                (heads + 2 * kv_heads) * head_size,
                hidden,
            ),
            f"{prefix}.norm_attn_norm.attn.out_proj.weight": (hidden, heads * head_size),
            f"{prefix}.ffn.router.layer.weight": (config["num_local_experts"], hidden),
        }
    return tensors


def _norm_exponent(config: Config) -> float | None:
    exponent = config["ffn_config"].get("moe_normalize_expert_weights", 1.0)
    return None if exponent is None else float(exponent)


DBRX = Family(
    model_type="dbrx",
    architectures=("DbrxForCausalLM",),
    experts_class="DbrxExperts",
    expert_shape=_expert_shape,
    expert_tensors=_expert_tensors,
    dense_tensors=_dense_tensors,
    gate=lambda config: GateSpec(norm_exponent=_norm_exponent(config), float32=()),
    gate_module="router.layer",
    stacks_experts=True,
    usual=_usual,
    transformers_config=_transformers_config,
    options={"tie_word_embeddings": (False,)},
    count_keys=("ffn_config.moe_num_experts",),
    top_k_keys=("ffn_config.moe_top_k",),
)
