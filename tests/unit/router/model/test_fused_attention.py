"""The fused attention replaces transformers' own where, and only where, it is the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster.native import built
from experts.checkpoint.checkpoint import open_checkpoint
from router.model import fused_attention as attention
from router.model.fused_attention import FusedAttention, fuse_attention
from router.model.model import load_dense
from tests.checkpoints import save_mixtral

# Where fusing is sure to be possible; elsewhere a trial decides.
AMX = torch.cpu._is_amx_tile_supported()


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


@pytest.mark.parametrize("native", [] if built.native is None else [built.native])
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(1, 5),
    num_heads=st.integers(1, 4),
    half=st.integers(1, 70),
    wrong=st.booleans(),
)
def test_heads_are_rotated_natively_with_torchs_bits(
    native: ModuleType, seed: int, num_tokens: int, num_heads: int, half: int, wrong: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    heads = randn(1, num_tokens, num_heads + 2, 2 * half)
    if wrong:
        heads[0, 0, 0, 0], heads[0, -1, -1, -1] = torch.nan, torch.inf
    angles = randn(1, num_tokens, 2 * half), randn(1, num_tokens, 2 * half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "native", None)
        expected = attention._rotate_in_place(heads, num_heads, *angles)
    untouched = heads[:, :, num_heads:].clone()
    got = attention._rotate_in_place(heads, num_heads, *angles)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~got.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert torch.equal(heads[:, :, num_heads:].view(torch.int16), untouched.view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "angle_dtype", "step"),
    [
        (torch.float16, torch.float16, 1),
        (torch.float32, torch.float32, 1),
        (torch.bfloat16, torch.float32, 1),
        (torch.bfloat16, torch.bfloat16, 2),
    ],
    ids=["float16", "float32", "angles in float32", "heads that do not lie together"],
)
def test_what_is_not_rotated_natively_is_rotated_by_torch(
    dtype: torch.dtype, angle_dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(1, 3, 4, 8 * step, generator=generator).to(dtype)[..., ::step]
    angles = tuple(torch.randn(1, 3, 8, generator=generator).to(angle_dtype) for _ in range(2))
    got = attention._rotate_in_place(heads, 2, *angles)
    monkeypatch.setattr(attention, "native", None)
    assert torch.equal(got, attention._rotate_in_place(heads, 2, *angles))
