"""Small checkpoints of all families with a tokenizer, and an independent model of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests import grok_oracle
from tests.checkpoints import save_mixtral, save_tokenizer
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import check_greedy

PROMPT = (17, 201, 33, 80, 5, 123, 64, 250)


def _save_grok(style: str) -> Callable[..., grok_oracle.Weights]:
    def save(folder: Path, **sizes: Any) -> grok_oracle.Weights:
        weights = grok_oracle.save_grok(folder, style, **sizes)
        save_tokenizer(folder)
        return weights

    return save


TRANSFORMERS: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, **SAVERS}
"""The families that transformers has."""
ALL = TRANSFORMERS | {style: _save_grok(style) for style in ("grok-1", "grok")}
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
}
"""Sizes with which half of the experts are enough for the gate."""


def save(name: str, folder: Path, **sizes: Any) -> Any:
    """Save a family's checkpoint; returns transformers' model, or Grok's weights."""
    return ALL[name](folder, **SIZES.get(name, {}), **sizes)


def whole_model(folder: Path) -> Any:
    """Return transformers' own model of a folder, whole, in float32."""
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.for_model(**checkpoint.family.transformers_config(checkpoint.config))
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, **kinds
    ).eval()


@torch.inference_mode()
def logits_of(name: str, model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the independent model's logits [N, L, V] of rows [N, L]."""
    if name in TRANSFORMERS:
        return model(input_ids=rows, use_cache=False).logits
    return torch.stack([grok_oracle.all_logits(model, row) for row in rows.tolist()])


def served_tokens(folder: Path, prompt: Sequence[int] = PROMPT, count: int = 8) -> list[int]:
    """Return the greedy tokens of the product's engine and expert banks."""
    cluster = LocalCluster(folder, dtype="float32")  # as the independent models compute
    [[event]] = cluster.generate(greedy_request("r", prompt, count))
    cluster.close()
    return list(event.token_ids)


def check_served(name: str, folder: Path, count: int = 8) -> None:
    """Check that the product serves a folder with the tokens of its independent model."""
    tokens = served_tokens(folder, count=count)
    if name in TRANSFORMERS:
        check_greedy(tokens, whole_model(folder), PROMPT, count)
    else:
        assert tokens == grok_oracle.greedy_tokens(grok_weights(folder), PROMPT, count)


def grok_weights(folder: Path) -> grok_oracle.Weights:
    """Return a Grok folder's tensors by the names of xAI's code."""
    from safetensors.torch import load_file

    from experts.families.grok import name_of_xai

    found = load_file(folder / "model.safetensors")
    if open_checkpoint(folder).family.model_type == "grok-1":
        found = {name_of_xai(name): tensor for name, tensor in found.items()}
    return found


def gates_of(checkpoint: Checkpoint, model: nn.Module) -> list[nn.Module]:
    """Return the gates of transformers' model, by layer."""
    path = checkpoint.family.gate_module
    ends = (f".mlp.{path}", f".ffn.{path}", f".block_sparse_moe.{path}")
    return [module for name, module in model.named_modules() if name.endswith(ends)]
