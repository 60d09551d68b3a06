"""Mixtral checkpoints written in the layouts of others, by mappings of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

State = Mapping[str, torch.Tensor]
Packed = tuple[np.ndarray, gguf.GGMLQuantizationType]
MOE = "block_sparse_moe"


def as_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Put each head's rows j and j + half beside each other, as rotary pairs."""
    size = weight.shape[0] // num_heads
    rows = []
    for head in range(num_heads):
        for j in range(size // 2):
            rows += [head * size + j, head * size + j + size // 2]
    return weight[rows]


def _attention(config: MixtralConfig, state: State, prefix: str) -> dict[str, torch.Tensor]:
    weights = {part: state[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkvo"}
    weights["q"] = as_pairs(weights["q"], config.num_attention_heads)
    weights["k"] = as_pairs(weights["k"], config.num_key_value_heads)
    return weights


def mistral_tensors(
    config: MixtralConfig, state: State, block: str, stacked: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors as Mistral names them; older files have the experts stacked."""
    tensors = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"layers.{layer}", f"model.layers.{layer}"
        for part, weight in _attention(config, state, ours).items():
            tensors[f"{theirs}.attention.w{part}.weight"] = weight
        tensors[f"{theirs}.attention_norm.weight"] = state[f"{ours}.input_layernorm.weight"]
        tensors[f"{theirs}.ffn_norm.weight"] = state[f"{ours}.post_attention_layernorm.weight"]
        tensors[f"{theirs}.{block}.gate.weight"] = state[f"{ours}.{MOE}.gate.weight"]
        for matrix in ("w1", "w2", "w3"):
            experts = [
                state[f"{ours}.{MOE}.experts.{expert}.{matrix}.weight"]
                for expert in range(config.num_local_experts)
            ]
            if stacked:
                rows = [weight.T if matrix == "w2" else weight for weight in experts]
                tensors[f"{theirs}.{block}.{matrix}"] = torch.cat(rows)
                continue
            for expert, weight in enumerate(experts):
                tensors[f"{theirs}.{block}.experts.{expert}.{matrix}.weight"] = weight
    return tensors


def write_mistral(folder: Path, config: MixtralConfig, tensors: State, num_files: int = 1) -> None:
    """Write ``params.json`` and the tensors, spread over files."""
    folder.mkdir()
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "moe": {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        },
    }
    (folder / "params.json").write_text(json.dumps(params))
    names = list(tensors)
    for number in range(num_files):
        file = (
            "consolidated.safetensors"
            if num_files == 1
            else f"consolidated.{number:02}.safetensors"
        )
        part = {name: tensors[name].contiguous() for name in names[number::num_files]}
        save_file(part, folder / file)


def packed_f32(weight: torch.Tensor) -> Packed:
    """Return a weight as it is."""
    return weight.float().numpy(), gguf.GGMLQuantizationType.F32


def packed_bf16(weight: torch.Tensor) -> Packed:
    """Return a bf16 matrix's bits; a vector in fp32, as llama.cpp keeps it."""
    if weight.dim() < 2:
        return packed_f32(weight)
    data = weight.contiguous().view(torch.uint8).numpy()
    return data, gguf.GGMLQuantizationType.BF16


def q8_codes(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return scales (fp16) and codes of blocks of 32 values."""
    blocks = weight.float().numpy().reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    return scales, np.round(blocks / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)


def q8_values(weight: torch.Tensor) -> torch.Tensor:
    """Return what a weight has become by Q8_0."""
    scales, codes = q8_codes(weight)
    return torch.from_numpy(scales.astype(np.float32) * codes).reshape(weight.shape)


def packed_q8(weight: torch.Tensor) -> Packed:
    """Return a matrix in Q8_0, that is a scale and 32 codes by turns; a vector in fp32."""
    if weight.dim() < 2:
        return packed_f32(weight)
    scales, codes = q8_codes(weight)
    data = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1)
    return data.reshape(*weight.shape[:-1], -1), gguf.GGMLQuantizationType.Q8_0


def add_llama_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sizes of a Llama-like model of transformers as llama.cpp names them."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def write_whole(writer: gguf.GGUFWriter) -> None:
    """Write a file with all that its writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    file: Path,
    config: MixtralConfig,
    state: State,
    pack: Callable[[torch.Tensor], Packed] = packed_f32,
    stacked: bool = True,
    leave_out: str = "",
    architecture: str = "llama",
) -> None:
    """Write a GGUF file as llama.cpp has Mixtral."""
    writer = gguf.GGUFWriter(file, architecture)
    add_llama_sizes(writer, config)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_eos_token_id(config.eos_token_id)
    for name, weight in _gguf_tensors(config, state, stacked).items():
        if name != leave_out:
            data, kind = pack(weight)
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    write_whole(writer)


def _gguf_tensors(config: MixtralConfig, state: State, stacked: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        for part, weight in _attention(config, state, ours).items():
            tensors[f"{theirs}.attn_{'output' if part == 'o' else part}.weight"] = weight
        tensors[f"{theirs}.attn_norm.weight"] = state[f"{ours}.input_layernorm.weight"]
        tensors[f"{theirs}.ffn_norm.weight"] = state[f"{ours}.post_attention_layernorm.weight"]
        tensors[f"{theirs}.ffn_gate_inp.weight"] = state[f"{ours}.{MOE}.gate.weight"]
        for matrix, called in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            experts = [
                state[f"{ours}.{MOE}.experts.{expert}.{matrix}.weight"]
                for expert in range(config.num_local_experts)
            ]
            if stacked:
                tensors[f"{theirs}.ffn_{called}_exps.weight"] = torch.stack(experts)
                continue
            for expert, weight in enumerate(experts):
                tensors[f"{theirs}.ffn_{called}.{expert}.weight"] = weight
    return tensors
