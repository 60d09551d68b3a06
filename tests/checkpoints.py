"""Small random checkpoints in the Mixtral format, with nothing left at its initial value."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from experts.checkpoint.hash_cache import BESIDE

VOCAB_SIZE = 320


def save_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Save a byte-level BPE tokenizer with an end-of-sequence token (id 0).

    Its chat template shows the names of tools, and that calls are as Qwen's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the quick brown fox jumps over the lazy dog and then the other things there"] * 4
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }} <tool_call>\n{% endfor %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    fast.save_pretrained(folder)


def save_mixtral(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object
) -> MixtralForCausalLM:
    """Save a random Mixtral checkpoint with tokenizer; returns the model with eager experts."""
    torch.manual_seed(seed)
    sizes: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    model = MixtralForCausalLM(MixtralConfig(**{**sizes, **overrides}))
    randomise(model)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a checkpoint without its kept hashes, which a reader of it may be writing."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns(f"{BESIDE}*"))


def transformers_tokens(oracle: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Return what ``transformers.generate`` makes of a prompt, greedily and past any end."""
    ids = torch.tensor([list(prompt)], device=oracle.device)
    with torch.inference_mode():
        output = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
        )
    return tuple(output[0, len(prompt) :].tolist())


def randomise(model: nn.Module) -> None:
    """Give every parameter a random value: norms around 1, biases and all others around 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.split(".")[-2]
            scale, offset = (0.2, 1.0) if is_norm else (0.15, 0.0)
            parameter.copy_(torch.randn_like(parameter) * scale + offset)
