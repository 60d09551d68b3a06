"""Tensors that many families have alike, by the names of Llama's classes in transformers."""

from __future__ import annotations

from experts.families.base import Config, ExpertTensors, GateSpec, Part, Shapes, head_sizes


def outer_tensors(config: Config) -> Shapes:
    """Return embedding, last norm and, where it is not tied, the output head."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def layer_tensors(
    config: Config, layer_id: int, qkv_bias: bool = False, output_bias: bool = False
) -> Shapes:
    """Return grouped-query attention and the two norms of a layer."""
    hidden, prefix = config["hidden_size"], f"model.layers.{layer_id}"
    heads, kv_heads, head_size = head_sizes(config)
    tensors: Shapes = {
        f"{prefix}.self_attn.q_proj.weight": (heads * head_size, hidden),
        f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_size, hidden),
        f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_size, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_size),
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
    """Return a gated feed-forward layer, one that is no routed expert."""
    return {
        f"{prefix}.gate_proj.weight": (inner_size, hidden_size),
        f"{prefix}.up_proj.weight": (inner_size, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, inner_size),
    }


def softmax_gate(config: Config) -> GateSpec:
    """Return the gate of Qwen's and OLMoE's classes, which renormalises where the config says."""
    return GateSpec(renormalises=bool(config.get("norm_topk_prob", False)))


def plain_expert(
    prefix: str,
    hidden_size: int,
    inner_size: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> ExpertTensors:
    """Return an expert of three matrices of its own, called gate, up, down by ``names``."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    wide, narrow = (inner_size, hidden_size), (hidden_size, inner_size)
    return ExpertTensors(Part(gate, wide), Part(up, wide), Part(down, narrow))
