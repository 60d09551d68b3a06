"""The fused attention replaces transformers' own where, and only where, it is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from experts import ffn
from experts.checkpoint import open_checkpoint
from router.attention import FusedAttention, fuse_attention
from router.model import load_dense
from tests.checkpoints import save_mixtral

# Where fusing is sure to be possible; elsewhere a trial decides.
AMX = ffn._HAS_AMX


def attentions(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Attention")]


def test_every_layers_attention_is_fused_in_bf16(tmp_path: Path) -> None:
    save_mixtral(tmp_path, dtype=torch.bfloat16)
    model = load_dense(open_checkpoint(tmp_path), torch.bfloat16)
    fuse_attention(model)
    possible = [["FusedAttention"] * 3, *([] if AMX else [["MixtralAttention"] * 3])]
    assert attentions(model) in possible


def test_in_fp32_transformers_own_stays(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    model = load_dense(open_checkpoint(tmp_path), torch.float32)
    fuse_attention(model)
    assert attentions(model) == ["MixtralAttention"] * 3


def another_rotation(original: nn.Module) -> None:
    forward = original.forward

    def turned(position_embeddings: tuple[torch.Tensor, torch.Tensor], **others: object) -> object:
        cos, sin = position_embeddings
        return forward(position_embeddings=(cos, -sin), **others)

    original.forward = turned  # type: ignore[method-assign]


def another_signature(original: nn.Module) -> None:
    original.forward = lambda states: (states, None)  # type: ignore[method-assign]


def norms_of_its_own(original: nn.Module) -> None:
    original.q_norm = nn.Identity()


@pytest.mark.parametrize("change", [another_rotation, another_signature, norms_of_its_own])
def test_another_attention_stays(tmp_path: Path, change: object) -> None:
    save_mixtral(tmp_path, dtype=torch.bfloat16)
    model = load_dense(open_checkpoint(tmp_path), torch.bfloat16)
    change(model.model.layers[1].self_attn)  # type: ignore[operator]
    fuse_attention(model)
    assert not isinstance(model.model.layers[1].self_attn, FusedAttention)
