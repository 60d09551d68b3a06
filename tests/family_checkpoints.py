"""Small random checkpoints of every family that transformers has, each with its peculiarities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.checkpoints import VOCAB_SIZE, randomise, save_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def save_qwen2_moe(folder: Path, **overrides: Any) -> Any:
    """A dense layer between two mixtures; a shared expert; windows in every other layer."""
    sizes = {
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 72,
        "num_experts": 8,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 3,
    }
    return _save(folder, "Qwen2Moe", sizes | overrides)


def save_qwen3_moe(folder: Path, **overrides: Any) -> Any:
    """Heads of a size of their own with norms; every second layer dense."""
    sizes = {
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "head_dim": 24,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "norm_topk_prob": True,
    }
    return _save(folder, "Qwen3Moe", sizes | overrides)


def save_olmoe(folder: Path, **overrides: Any) -> Any:
    """Clipping that clips: queries, keys and values are larger than 0.8."""
    sizes = {"intermediate_size": 48, "num_experts": 8, "clip_qkv": 0.8}
    return _save(folder, "Olmoe", sizes | overrides)


def save_dbrx(folder: Path, **overrides: Any) -> Any:
    """The configuration as Databricks published it: a whole exponent, a rotary base inside."""
    sizes = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    }
    model = _save(folder, "Dbrx", sizes | overrides)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config["ffn_config"]["moe_normalize_expert_weights"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return model


def save_gpt_oss(folder: Path, **overrides: Any) -> Any:
    """Sinks, biases, windows in every other layer; YaRN, as published."""
    sizes = {
        "intermediate_size": 48,
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 12,
        "num_hidden_layers": 4,
    }
    return _save(folder, "GptOss", sizes | overrides)


LATENT: dict[str, Any] = {
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}


def save_deepseek_v2(folder: Path, **overrides: Any) -> Any:
    """Groups by their best expert; queries of full rank."""
    sizes: dict[str, Any] = {"topk_method": "group_limited_greedy", "q_lora_rank": None}
    sizes |= {"routed_scaling_factor": 1.5}
    return _save(folder, "DeepseekV2", LATENT | sizes | overrides)


def save_deepseek_v3(folder: Path, **overrides: Any) -> Any:
    """Groups by their best two, corrections, YaRN with a scale of scores under its older name."""
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    model = _save(folder, "DeepseekV3", LATENT | {"rope_parameters": yarn} | overrides)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return model


SAVERS: dict[str, Callable[..., Any]] = {
    "qwen2_moe": save_qwen2_moe,
    "qwen3_moe": save_qwen3_moe,
    "olmoe": save_olmoe,
    "dbrx": save_dbrx,
    "gpt_oss": save_gpt_oss,
    "deepseek_v2": save_deepseek_v2,
    "deepseek_v3": save_deepseek_v3,
}


def _save(folder: Path, kind: str, sizes: dict[str, Any]) -> Any:
    """Save a random checkpoint; returns the model with eager attention and experts."""
    own = {"dtype": torch.float32, "max_shard_size": "5GB", "seed": 0}
    options = {key: sizes.pop(key, value) for key, value in own.items()}
    common = {k: v for k, v in COMMON.items() if kind != "Dbrx" or "token_id" in k or "vocab" in k}
    config = getattr(transformers, f"{kind}Config")(**{**common, **sizes})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(options["seed"])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    model = model.to(options["dtype"]).eval()
    model.save_pretrained(folder, max_shard_size=options["max_shard_size"])
    save_tokenizer(folder)
    return model
