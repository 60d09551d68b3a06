"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): latent attention, shared experts, groups."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from experts.families.base import Config, ExpertShape, Family, GateSpec, Shapes, size
from experts.families.common import mlp_expert, mlp_tensors, outer_tensors, routed_shape

_CORRECTION = "mlp.gate.e_score_correction_bias"


def _expert_shape(config: Config) -> ExpertShape:
    num_dense = config.get("first_k_dense_replace") or 0
    if type(num_dense) is not int or num_dense < 0:
        raise ValueError(f"first_k_dense_replace must be an integer (given: {num_dense!r:.40})")
    return routed_shape(
        config,
        num_experts="n_routed_experts",
        intermediate_size="moe_intermediate_size",
        layers=range(num_dense, config["num_hidden_layers"]),
    )


def _check_groups(config: Config, least: int) -> None:
    """Raise ``ValueError`` unless groups are equal, large enough, and have enough experts."""
    groups, chosen = size(config, "n_group"), size(config, "topk_group")
    experts, wanted = size(config, "n_routed_experts"), size(config, "num_experts_per_tok")
    if experts % groups or experts // groups < least:
        raise ValueError(f"n_group {groups} does not fit n_routed_experts {experts}")
    if chosen > groups or chosen * (experts // groups) < wanted:
        raise ValueError(
            f"topk_group {chosen} of n_group {groups} does not fit num_experts_per_tok {wanted}"
        )


def _v2_shape(config: Config) -> ExpertShape:
    if config.get("topk_method") == "group_limited_greedy":
        _check_groups(config, least=1)
    return _expert_shape(config)


def _v3_usual(config: Config) -> Config:
    return {"n_group": 8, "topk_group": 4} | config


def _v3_shape(config: Config) -> ExpertShape:
    _check_groups(config, least=2)
    return _expert_shape(config)


def _v2_tensors(config: Config) -> Shapes:
    tensors, hidden = outer_tensors(config), config["hidden_size"]
    with_experts = set(_expert_shape(config).layers)
    shared = size(config, "n_shared_experts", 1) * config["moe_intermediate_size"]
    for layer_id in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_id}"
        tensors |= _latent_attention(config, f"{prefix}.self_attn")
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if layer_id in with_experts:
            tensors[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            tensors |= mlp_tensors(f"{prefix}.mlp.shared_experts", hidden, shared)
        else:
            tensors |= mlp_tensors(f"{prefix}.mlp", hidden, size(config, "intermediate_size"))
    return tensors


def _v3_tensors(config: Config) -> Shapes:
    corrections = {
        f"model.layers.{layer_id}.{_CORRECTION}": (config["n_routed_experts"],)
        for layer_id in _expert_shape(config).layers
    }
    return _v2_tensors(config) | corrections


def _latent_attention(config: Config, prefix: str) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain, rotary, value, latent = (
        size(config, key)
        for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    tensors: Shapes = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
        f"{prefix}.kv_a_layernorm.weight": (latent,),
        f"{prefix}.kv_b_proj.weight": (heads * (plain + value), latent),
        f"{prefix}.o_proj.weight": (hidden, heads * value),
    }
    queries = heads * (plain + rotary)
    if config.get("q_lora_rank") is None:
        return tensors | {f"{prefix}.q_proj.weight": (queries, hidden)}
    rank = size(config, "q_lora_rank")
    return tensors | {
        f"{prefix}.q_a_proj.weight": (rank, hidden),
        f"{prefix}.q_a_layernorm.weight": (rank,),
        f"{prefix}.q_b_proj.weight": (queries, rank),
    }


def _latent_values(config: Config) -> int:
    return size(config, "kv_lora_rank") + size(config, "qk_rope_head_dim")


def _predicting_layers(config: Config) -> tuple[str, ...]:
    """Return the prefixes of the layers for multi-token prediction, which are not served."""
    first, count = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    if type(count) is not int or not 0 <= count <= first:
        raise ValueError(
            f"num_nextn_predict_layers must be from 0 to {first} (given: {count!r:.40})"
        )
    return tuple(f"model.layers.{layer_id}." for layer_id in range(first, first + count))


def _v2_gate(config: Config) -> GateSpec:
    spec = GateSpec(
        scaling_factor=config.get("routed_scaling_factor", 1.0),
        float32=("logits", "scores", "weights"),
        sorts=False,
    )
    if config.get("topk_method") != "group_limited_greedy":
        return spec
    return replace(spec, num_groups=config["n_group"], topk_groups=config["topk_group"])


def _v3_gate(config: Config) -> GateSpec:
    return GateSpec(
        score="sigmoid",
        renormalises=bool(config.get("norm_topk_prob", True)),
        scaling_factor=config.get("routed_scaling_factor", 2.5),
        num_groups=config["n_group"],
        topk_groups=config["topk_group"],
        best_of_group=2,
        float32=("logits", "scores", "weights"),
        sorts=False,
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    experts_class="DeepseekV2Experts",
    expert_shape=_v2_shape,
    expert_tensors=partial(mlp_expert, intermediate_size="moe_intermediate_size"),
    dense_tensors=_v2_tensors,
    gate=_v2_gate,
    options={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "moe_layer_freq": (1,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    cache_values=_latent_values,
    count_keys=("n_routed_experts",),
    caches_latents=True,
    in_float32=("mlp.gate.weight",),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    experts_class="DeepseekV3Experts",
    expert_shape=_v3_shape,
    expert_tensors=partial(mlp_expert, intermediate_size="moe_intermediate_size"),
    dense_tensors=_v3_tensors,
    gate=_v3_gate,
    usual=_v3_usual,
    options={
        "attention_bias": (False,),
        "moe_layer_freq": (1,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    cache_values=_latent_values,
    count_keys=("n_routed_experts",),
    caches_latents=True,
    in_float32=("mlp.gate.weight", _CORRECTION),
    ignored=_predicting_layers,
)
