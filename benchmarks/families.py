"""Random checkpoints of one family for each layout of tensors, all of about the same size.

A test measures the memory of loading with them. A family's own description of its tensors says what
to write.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.common import SIZES, save_tokenizer

WIDTH, INNER = SIZES["hidden_size"], SIZES["intermediate_size"]
_COMMON = {
    key: SIZES[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "max_position_embeddings",
    )
}
_FINE: dict[str, Any] = {"intermediate_size": 2 * INNER, "moe_intermediate_size": INNER}
_LATENT: dict[str, Any] = {
    **_FINE,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_key_value_heads": SIZES["num_attention_heads"],
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 4,
    "topk_group": 2,
}
_GROK: dict[str, Any] = {
    "intermediate_size": INNER,
    "num_experts": 8,
    "attn_output_multiplier": 0.125,
    "max_attn_value": 30.0,
    "embedding_multiplier_scale": 22.6,
    "output_multiplier_scale": 0.577,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": INNER, "num_local_experts": 8},
    "dbrx": {
        "d_model": WIDTH,
        "n_heads": SIZES["num_attention_heads"],
        "n_layers": SIZES["num_hidden_layers"],
        "max_seq_len": SIZES["max_position_embeddings"],
        "vocab_size": SIZES["vocab_size"],
        "attn_config": {"kv_n_heads": SIZES["num_key_value_heads"]},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "gpt_oss": {"intermediate_size": INNER, "num_local_experts": 8, "head_dim": 64},
    "deepseek_v3": _LATENT,
    "grok-1": _GROK,
}
"""By ``model_type``: what differs from :data:`benchmarks.common.SIZES`."""


def config_of(model_type: str) -> dict[str, Any]:
    """Return a family's ``config.json``, as transformers would write it where it knows it."""
    import transformers

    from experts.families.registry import FAMILIES

    own = CONFIGS[model_type] if model_type == "dbrx" else {**_COMMON, **CONFIGS[model_type]}
    own |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config: dict[str, Any] = own
    if model_type in transformers.CONFIG_MAPPING:
        made = transformers.AutoConfig.for_model(model_type, **own)
        config = json.loads(made.to_json_string(use_diff=False))
    architecture = FAMILIES[model_type].architectures[0]
    return {**config, "model_type": model_type, "architectures": [architecture]}


def make_family(folder: Path, model_type: str, seed: int = 0) -> int:
    """Save a random bf16 checkpoint of a family; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    from experts.checkpoint.config import checked_shape, family_of, usual_config

    config, file = config_of(model_type), folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    family = family_of(config, file)
    config = usual_config(family, config, file)
    shapes = family.dense_tensors(config)
    parts = family.expert_parts(config, checked_shape(family, config, file))
    shapes |= {part.name: part.shape for part in parts}
    torch.manual_seed(seed)
    tensors = {name: _random(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def _random(shape: tuple[int, ...]) -> Any:
    """Return values that keep a model's hidden states of about one size, and its gates apart."""
    import torch

    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape)).bfloat16()
    return (torch.randn(shape) / math.sqrt(shape[-1])).bfloat16()
