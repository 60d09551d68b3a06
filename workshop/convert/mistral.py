"""Mistral's own layout: ``params.json`` beside ``consolidated*.safetensors``.

Each matrix of an expert is a tensor. In older files the experts are stacked by rows: ``w1``, ``w2``
and ``w3`` are [experts * I, H], with ``w2`` transposed. The rows of queries and keys are stored as
rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from experts.checkpoint.config import read_json
from experts.families.base import Config
from workshop.convert.source import SafetensorsFiles, Source, Take, expert_part, takes_by_part

PARAMS_FILE = "params.json"
_PATTERN = "consolidated*.safetensors"
_ROPE_THETA, _CONTEXT = 1_000_000.0, 32_768
"""Defaults for missing keys: the value in Mistral's own code, and Mixtral 8x7B's context."""
_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_BLOCKS = ("block_sparse_moe", "feed_forward")


def is_mistral(path: Path) -> bool:
    """Return whether a folder has this layout's configuration and weights."""
    return (path / PARAMS_FILE).exists() and any(path.glob(_PATTERN))


def open_mistral(path: Path) -> Source:
    """Read a folder's parameters and headers; raises :class:`CheckpointError`."""
    params_file = path / PARAMS_FILE
    config = _config(read_json(params_file), params_file)
    shards = tuple(sorted(path.glob(_PATTERN)))
    files = (params_file, *shards)
    tensors = SafetensorsFiles(shards)
    return Source("mistral", path, params_file, config, tensors, files, _takes(config))


def _config(params: dict[str, Any], file: Path) -> Config:
    moe = params.get("moe")
    if not isinstance(moe, dict):
        raise CheckpointError("has no mapping 'moe', so it is not a mixture of experts", str(file))
    if params.get("quantization"):
        raise CheckpointError("'quantization' is not supported", str(file))
    try:
        config: Config = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": params["dim"],
            "intermediate_size": params["hidden_dim"],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
            "head_dim": params.get("head_dim", params["dim"] // params["n_heads"]),
            "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["num_experts_per_tok"],
            "vocab_size": params["vocab_size"],
            "rms_norm_eps": params["norm_eps"],
        }
    except KeyError as error:
        raise CheckpointError(f"lacks the key {error.args[0]}", str(file)) from None
    except (TypeError, ZeroDivisionError):
        raise CheckpointError("dim and n_heads must be positive integers", str(file)) from None
    return config | {
        "rope_theta": params.get("rope_theta") or _ROPE_THETA,
        "max_position_embeddings": params.get("max_position_embeddings")
        or params.get("max_seq_len")
        or _CONTEXT,
        "sliding_window": params.get("sliding_window"),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _takes(config: Config) -> Callable[[str], list[Take]]:
    def rest_takes(prefix: str, part: str) -> list[Take]:
        expert = expert_part(part)
        if expert is None:
            return [Take(f"{prefix}.{block}.gate.weight") for block in _BLOCKS]
        expert_id, matrix = expert
        stacked = (expert_id, config["num_local_experts"])
        return [
            *(Take(f"{prefix}.{block}.experts.{expert_id}.{matrix}.weight") for block in _BLOCKS),
            *(
                Take(f"{prefix}.{block}.{matrix}{end}", part=stacked, transpose=matrix == "w2")
                for block in _BLOCKS
                for end in ("", ".weight")
            ),
        ]

    return takes_by_part(config, "layers", _OUTER, _IN_LAYER, rest_takes)
