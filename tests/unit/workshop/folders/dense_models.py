"""Small dense models of transformers with a tokenizer, as folders and as GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.checkpoints import randomise, save_tokenizer
from tests.foreign_layouts import Packed, add_llama_sizes, as_pairs, packed_f32, write_whole

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


SCALED_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


LLAMA, QWEN = (LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)
DENSE: dict[str, tuple[Any, ...]] = {
    "llama": (*LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "llama-tied": (*LLAMA, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-scaled": (*LLAMA, {"rope_parameters": SCALED_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (*QWEN, {}),
    "qwen2-windows": (
        *QWEN, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}  # fmt: skip


def save_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Save a random dense model in float32, with values of ``dtype``; returns transformers'."""
    config_class, model_class, more = DENSE[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | more | sizes)).eval()
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():  # buffers stay as they are
            parameter.copy_(parameter.to(dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def write_dense_gguf(
    file: Path, model: Any, pack: Callable[[torch.Tensor], Packed] = packed_f32
) -> None:
    """Write a Llama or a Qwen2 as llama.cpp has it."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, kind)
    add_llama_sizes(writer, config)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    add_byte_level(writer, config.vocab_size)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data, packing = pack(_as_llama_cpp(kind, config, name, weight))
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(data), raw_dtype=packing)
    write_whole(writer)


def _as_llama_cpp(kind: str, config: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    return as_pairs(weight, heads[part]) if kind == "llama" and part in heads else weight


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def byte_level(vocab_size: int) -> Tokenizer:
    """Return a trained byte-level tokenizer that splits digits as SmolLM does."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["the 12 quick brown foxes, and the other 1234 things"] * 4, trainer
    )
    return tokenizer


def add_byte_level(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Write the metadata of :func:`byte_level`."""
    found = json.loads(byte_level(vocab_size).to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in found["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
