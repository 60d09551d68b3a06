"""Sizes and tensors that many families share; tensors have the names of transformers' Llama."""

from __future__ import annotations

from collections.abc import Iterable

from experts.families.base import (
    Config,
    ExpertShape,
    ExpertTensors,
    GateSpec,
    Part,
    Shapes,
    head_sizes,
    size,
)


def routed_shape(
    config: Config,
    *,
    num_experts: str = "num_experts",
    intermediate_size: str = "intermediate_size",
    layers: Iterable[int] | None = None,
    activation: str | None = None,
    has_biases: bool = False,
) -> ExpertShape:
    """Return the sizes of the experts in ``layers``, by default all.

    ``num_experts`` and ``intermediate_size`` are keys of the configuration. The default of
    ``activation`` is the configured one.
    """
    return ExpertShape(
        layers=tuple(range(config["num_hidden_layers"]) if layers is None else layers),
        num_experts=size(config, num_experts),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        hidden_size=config["hidden_size"],
        intermediate_size=size(config, intermediate_size),
        activation=config.get("hidden_act", "silu") if activation is None else activation,
        has_biases=has_biases,
    )


def outer_tensors(config: Config) -> Shapes:
    """Return the embedding, the last norm, and the output head if it is not tied."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def attention_tensors(config: Config, prefix: str) -> Shapes:
    """Return the four matrices of grouped-query attention."""
    hidden = config["hidden_size"]
    heads, kv_heads, head_size = head_sizes(config)
    return {
        f"{prefix}.q_proj.weight": (heads * head_size, hidden),
        f"{prefix}.k_proj.weight": (kv_heads * head_size, hidden),
        f"{prefix}.v_proj.weight": (kv_heads * head_size, hidden),
        f"{prefix}.o_proj.weight": (hidden, heads * head_size),
    }


def layer_tensors(
    config: Config, layer_id: int, qkv_bias: bool = False, output_bias: bool = False
) -> Shapes:
    """Return the grouped-query attention and the two norms of a layer."""
    hidden, prefix = config["hidden_size"], f"model.layers.{layer_id}"
    heads, kv_heads, head_size = head_sizes(config)
    tensors = attention_tensors(config, f"{prefix}.self_attn") | {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    if qkv_bias:
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            tensors[f"{prefix}.self_attn.{name}.bias"] = (count * head_size,)
    if output_bias:
        tensors[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
    return tensors


def mlp_tensors(prefix: str, hidden_size: int, inner_size: int) -> Shapes:
    """Return a gated feed-forward layer that is not a routed expert."""
    return {
        f"{prefix}.gate_proj.weight": (inner_size, hidden_size),
        f"{prefix}.up_proj.weight": (inner_size, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, inner_size),
    }


def softmax_gate(config: Config) -> GateSpec:
    """Return the gate of Qwen and OLMoE, which ``norm_topk_prob`` renormalises."""
    return GateSpec(renormalises=bool(config.get("norm_topk_prob", False)))


def mlp_expert(
    config: Config, layer_id: int, expert_id: int, *, intermediate_size: str = "intermediate_size"
) -> ExpertTensors:
    """Return an expert with its own tensors in a layer's ``mlp``; see :func:`routed_shape`."""
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    return plain_expert(prefix, config["hidden_size"], config[intermediate_size])


def plain_expert(
    prefix: str,
    hidden_size: int,
    inner_size: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> ExpertTensors:
    """Return an expert with its own tensors; ``names`` are those of gate, up and down."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    wide, narrow = (inner_size, hidden_size), (hidden_size, inner_size)
    return ExpertTensors(Part(gate, wide), Part(up, wide), Part(down, narrow))
