"""A dense model as a mixture of one expert a layer, and the configurations of larger mixtures.

Mixtral is Llama with a mixture, and Qwen2-MoE is Qwen2 with a mixture and a shared expert.
Qwen2-MoE also has a switch for the biases that Llama lacks (``qkv_bias``). A shared expert that is
not needed has one neuron of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experts.checkpoint.config import family_of, usual_config, wrong_kinds
from experts.families.base import Config
from experts.families.counts import with_counts
from workshop.convert.source import QUANTISED, Entry, MadeTensors, Source, Take

if TYPE_CHECKING:
    import torch

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense feed-forward layer, in the order of ``ExpertTensors.parts()``."""
_CARRIED = (
    "hidden_act", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "vocab_size", "rope_parameters", "rope_scaling",
    "max_position_embeddings", "tie_word_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
_RMS_NORM_EPS, _ROPE_THETA, _MAX_WINDOW_LAYERS = 1e-6, 10_000.0, 28
"""The defaults of transformers' Llama, Mistral and Qwen2."""
_COMPUTED = ".rotary_emb.inv_freq"
"""The end of the names of tensors that old files have, and the configuration says."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a mixture: routed experts and a token's, and their and the shared neurons."""

    experts: int
    active: int
    expert_neurons: int
    shared_neurons: int


def qwen2_moe_config(dense: Source, sizes: Sizes, renormalises: bool) -> Config:
    """Return the ``config.json`` of a dense model as Qwen2-MoE; raises CheckpointError."""
    with wrong_kinds(dense.config_file):
        config, windows = dense.config, _windows(dense.config)
        is_windowed = "sliding_attention" in windows
        return _common(config) | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "qkv_bias": config["model_type"] == "qwen2",
            "intermediate_size": config["intermediate_size"],
            "moe_intermediate_size": sizes.expert_neurons,
            "shared_expert_intermediate_size": sizes.shared_neurons,
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.active,
            "norm_topk_prob": renormalises,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": is_windowed,
            "sliding_window": config["sliding_window"] if is_windowed else None,
            "layer_types": windows,
        }


def mixtral_config(dense: Source, experts: int, active: int) -> Config:
    """Return the ``config.json`` of a dense model without biases as Mixtral."""
    with wrong_kinds(dense.config_file):
        windows = set(_windows(dense.config))
        window = dense.config["sliding_window"] if windows == {"sliding_attention"} else None
        return _common(dense.config) | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": dense.config["intermediate_size"],
            "num_local_experts": experts,
            "num_experts_per_tok": active,
            "sliding_window": window,
        }


def _common(config: Config) -> Config:
    carried = {key: config[key] for key in _CARRIED if config.get(key) is not None}
    heads = config["num_attention_heads"]
    if config["model_type"] != "llama" and "num_key_value_heads" not in carried:
        raise KeyError("num_key_value_heads")
    common = {
        "hidden_act": "silu",
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "rms_norm_eps": config.get("rms_norm_eps", _RMS_NORM_EPS),
    } | carried
    if "rope_theta" not in (config.get("rope_parameters") or {}):
        common["rope_theta"] = config.get("rope_theta", _ROPE_THETA)
    return common


def _windows(config: Config) -> list[str]:
    """Return the kind of attention of each layer, by the rules of the dense classes."""
    num_layers, window = config["num_hidden_layers"], config.get("sliding_window")
    has_window = window is not None
    if config["model_type"] == "qwen2":
        has_window = has_window and bool(config.get("use_sliding_window", False))
        if has_window and config.get("layer_types"):
            return list(config["layer_types"])
    has_window = has_window and config["model_type"] != "llama"
    first = 0
    if config["model_type"] == "qwen2":
        first = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    return [
        "sliding_attention" if has_window and layer_id >= first else "full_attention"
        for layer_id in range(num_layers)
    ]


def one_expert(dense: Source, config: Config) -> Source:
    """Return a dense model as a mixture of one expert a layer, which has all its neurons.

    ``config`` is that of a larger mixture. Gates are zeros. Raises ``CheckpointError`` for
    configurations that the mixture's family does not have.
    """
    family = family_of(config, dense.config_file)
    changed = with_counts(family, config, 1, 1)
    if family.model_type == "qwen2_moe":
        neurons = config["intermediate_size"]
        changed |= {"moe_intermediate_size": neurons, "shared_expert_intermediate_size": 1}
    usual = usual_config(family, changed, dense.config_file)
    with wrong_kinds(dense.config_file):
        places = {
            part.name: f"model.layers.{layer_id}.mlp.{name}.weight"
            for layer_id in family.expert_shape(usual).layers
            for part, name in zip(
                family.expert_tensors(usual, layer_id, 0).parts(), EXPERT_PARTS, strict=True
            )
        }
        dense_tensors = family.dense_tensors(usual)
    zeros = {name: shape for name, shape in dense_tensors.items() if _is_of_mixture(name)}
    kept = {n: entry for n, entry in dense.tensors.entries.items() if not n.endswith(_COMPUTED)}
    dtype = next(iter(kept.values()), Entry((), QUANTISED)).dtype
    entries = kept | {name: Entry(shape, dtype) for name, shape in zeros.items()}

    def make(name: str) -> torch.Tensor:
        import torch

        if name in zeros:
            return torch.zeros(zeros[name])
        return dense.tensors.read(name, 0, entries[name].shape[0])

    def takes(name: str) -> list[Take]:
        return [Take(name)] if name in zeros else dense.takes(places.get(name, name))

    return replace(dense, config=changed, tensors=MadeTensors(entries, make), takes=takes)


def _is_of_mixture(name: str) -> bool:
    """Return whether a tensor is a gate's or a shared expert's, which a dense model lacks."""
    return ".shared_expert" in name or name.endswith((".mlp.gate.weight", "_moe.gate.weight"))
