"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): softmax, top-k, renormalise; SwiGLU experts."""

from __future__ import annotations

from experts.families.base import Config, ExpertShape, ExpertTensors, Family


def _expert_shape(config: Config) -> ExpertShape:
    return ExpertShape(
        layers=tuple(range(config["num_hidden_layers"])),
        num_experts=config["num_local_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        activation=config.get("hidden_act", "silu"),
    )


def _expert_tensors(layer_id: int, expert_id: int) -> ExpertTensors:
    prefix = f"model.layers.{layer_id}.block_sparse_moe.experts.{expert_id}"
    return ExpertTensors(
        gate=f"{prefix}.w1.weight", up=f"{prefix}.w3.weight", down=f"{prefix}.w2.weight"
    )


def _dense_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (vocab, hidden)
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_id}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}.block_sparse_moe.gate.weight": (config["num_local_experts"], hidden),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return tensors


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    experts_module="transformers.models.mixtral.modeling_mixtral",
    experts_class="MixtralExperts",
    expert_shape=_expert_shape,
    expert_tensors=_expert_tensors,
    dense_tensors=_dense_tensors,
)
