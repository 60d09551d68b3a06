"""The native attention of a layer against transformers' modules, family by family.

Dimension letters: T tokens, H hidden size, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.device import CPU
from cluster.native import built
from cluster.wire.tensors import to_bytes
from experts.checkpoint.checkpoint import open_checkpoint
from experts.compute.native_ffn import KERNELS
from router.model.attention import Attention, PagedBatch, Span
from router.model.attention_choice import choose_attention, make_cache
from router.model.cpu.native_layer import NativeAttentionHalf, NativeRotation, has_llamas_shape
from router.model.model import load_dense
from router.model.page_pool import pages_needed
from router.model.paged_attention import PagedContext
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import (
    save_dbrx,
    save_deepseek_v2,
    save_deepseek_v3,
    save_gpt_oss,
    save_olmoe,
    save_qwen2_moe,
    save_qwen3_moe,
)

BUILT = [] if built.native is None else [built.native]
LLAMAS: dict[str, Callable[..., Any]] = {
    "mixtral": save_mixtral,
    "qwen2_moe": save_qwen2_moe,
    "qwen3_moe": save_qwen3_moe,
    "olmoe": save_olmoe,
    "dbrx": save_dbrx,
    "gpt_oss": save_gpt_oss,
}
NUM_TOKENS = 23


class Layer:
    """The second layer of a random model: transformers' modules, and the native half."""

    def __init__(self, folder: Path, save: Callable[..., Any], dtype: torch.dtype) -> None:
        save(folder)
        self.checkpoint = open_checkpoint(folder)
        self.model = load_dense(self.checkpoint, dtype)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # checkpoints have ones and zeros
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.data = (0.5 + noise).to(parameter.dtype)
        base = self.model.base_model
        layer = getattr(base, "layers", None) or base.blocks
        self.norm, self.attention, self.next_norm = parts_of(layer[1])
        self.dtype, self.config = dtype, self.model.config
        self.rows = torch.randn(NUM_TOKENS, self.config.hidden_size, generator=generator).to(dtype)
        self.rotary_embedding = base.rotary_emb

    def paged(
        self,
        begin: int,
        end: int,
        like: PagedContext | None = None,
        dtype: torch.dtype | None = None,
    ) -> PagedContext:
        """Return the context of tokens [begin, end) of one sequence, in the cache of ``like``."""
        slots, dtype = np.arange(end), dtype or self.dtype
        if like is None:
            attention = choose_attention(self.checkpoint.family, self.config, None, dtype, CPU)
            num_pages = pages_needed(64, attention.page_size)
            family = self.checkpoint.family
            cache = make_cache(attention, family, self.config, num_pages, dtype, CPU)
        else:
            attention, cache = like.attention, like.cache
        batch = batch_of(attention, slots, begin)
        return PagedContext(cache, attention, batch, [False] * 9)

    def transformers(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual and normed rows by transformers' modules, computed in ``dtype``."""
        parts = self.norm, self.attention, self.next_norm
        norm, attention, next_norm = (copy.deepcopy(part).to(dtype) for part in parts)
        rows = self.rows[None].to(dtype)
        rotation = self.rotary_embedding(rows, torch.arange(NUM_TOKENS)[None])
        attended = attention(
            hidden_states=norm(rows),
            position_embeddings=rotation,
            attention_mask=None,
            paged=self.paged(0, NUM_TOKENS, dtype=dtype),
        )[0]
        residual = rows + attended
        return residual[0], next_norm(residual)[0]

    def half(self) -> NativeAttentionHalf:
        return NativeAttentionHalf(self.norm, self.attention, self.next_norm)

    def attend(
        self, half: NativeAttentionHalf, begin: int, end: int, like: PagedContext | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, PagedContext]:
        rotate = NativeRotation(self.rotary_embedding, self.attention.head_dim)
        angles = rotate(self.rows, torch.arange(begin, end)[None])
        paged = self.paged(begin, end, like)
        return *half(self.rows[begin:end], angles, paged), paged


def parts_of(layer: Any) -> tuple[nn.Module, Any, nn.Module]:
    if hasattr(layer, "norm_attn_norm"):
        both = layer.norm_attn_norm
        return both.norm_1, both.attn, both.norm_2
    return layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm


def batch_of(attention: Attention, slots: np.ndarray, begin: int) -> PagedBatch:
    num_decode = int(len(slots) - begin == 1)
    view = attention.view([Span(slots, begin)], num_decode)
    return PagedBatch(torch.from_numpy(slots[begin:]), view)


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LLAMAS)
@torch.inference_mode()
def test_it_is_transformers_attention(
    native: ModuleType, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    layer = Layer(tmp_path, LLAMAS[family], dtype)
    assert has_llamas_shape(layer.norm, layer.attention, layer.next_norm)
    got = layer.attend(layer.half(), 0, NUM_TOKENS)[:2]
    exact, rounded = layer.transformers(torch.float32), layer.transformers(dtype)
    for index in range(2):
        assert got[index].dtype == dtype
        off = (got[index].float() - exact[index]).norm()
        theirs = (rounded[index].float() - exact[index]).norm()
        assert off <= max(1.1 * theirs, 1e-5 * exact[index].norm())


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LLAMAS)
@torch.inference_mode()
def test_a_token_has_its_bits_however_the_sequence_is_cut(
    native: ModuleType, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    layer = Layer(tmp_path, LLAMAS[family], dtype)
    half = layer.half()
    whole = layer.attend(half, 0, NUM_TOKENS)[:2]
    for cuts in ((0, 5, 16, 17, NUM_TOKENS), range(NUM_TOKENS + 1)):
        paged, parts = None, []
        for begin, end in zip(cuts, list(cuts)[1:], strict=False):
            residual, normed, paged = layer.attend(half, begin, end, paged)
            parts.append((residual, normed))
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize("save", [save_mixtral, save_gpt_oss])
def test_angles_are_the_models_at_any_position(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path)
    model = load_dense(open_checkpoint(tmp_path), torch.float32)
    rotary_embedding = model.base_model.rotary_emb
    size = parts_of(model.base_model.layers[1])[1].head_dim
    rotate = NativeRotation(rotary_embedding, size)
    for positions in ([0, 3], [1023], [1024, 5, 5], [9000], [3, 0, 1024]):  # the table grows twice
        ids = torch.tensor([positions])
        cosines, sines = rotary_embedding(torch.empty(0), ids)
        expected = torch.cat((cosines[..., : size // 2], sines[..., : size // 2]), dim=-1)
        assert torch.equal(rotate(torch.empty(0), ids), expected)


@pytest.mark.parametrize("save", [save_deepseek_v2, save_deepseek_v3])
def test_latent_attention_has_another_shape(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path)
    layer = load_dense(open_checkpoint(tmp_path), torch.float32).base_model.layers[1]
    assert not has_llamas_shape(*parts_of(layer))


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize(
    "change",
    [
        lambda attention: delattr(attention, "k_norm"),
        lambda attention: setattr(attention, "k_norm", nn.LayerNorm(16, bias=False)),
        lambda attention: setattr(attention.k_norm, "variance_epsilon", 0.5),
        lambda attention: setattr(attention, "v_proj", nn.Linear(64, 32)),
        lambda attention: attention.register_buffer("angles", torch.ones(1)),
        lambda attention: setattr(attention, "gate_proj", nn.Linear(8, 8)),
    ],
)
def test_an_attention_with_other_parts_stays_transformers(
    native: ModuleType, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    save_qwen3_moe(tmp_path)
    layer = load_dense(open_checkpoint(tmp_path), torch.float32).base_model.layers[1]
    assert has_llamas_shape(*parts_of(layer))
    change(layer.self_attn)
    assert not has_llamas_shape(*parts_of(layer))


H, Q, G, D = 40, 4, 2, 6
OUTPUTS = (Q + 2 * G) * D


def inputs_by(
    native: ModuleType, kernel: str | None, threads: int = 1, **changes: Any
) -> torch.Tensor:
    """Return queries, keys and values of seven tokens, with every part that a layer can have."""
    generator = torch.Generator().manual_seed(1)
    tokens = 7
    call: dict[str, Any] = {
        "rows": torch.randn(tokens, H, generator=generator),
        "norm": torch.randn(H, generator=generator),
        "packed": bytes(to_bytes(torch.randn(H * 64 + 64, generator=generator))),
        "angles": torch.randn(tokens, 2, D // 2, generator=generator),
        "head_norms": torch.randn(2 * D, generator=generator),
        "out": torch.zeros(tokens, OUTPUTS),
        "sizes": (H, Q, G, D, 0, 0, 1, 1, D, D),
        "factors": (1e-5, 1e-6, 2.5),
        **changes,
    }
    parts = [v if isinstance(v, bytes) else to_bytes(v) for v in list(call.values())[:6]]
    native.attention_inputs(*parts, call["sizes"], call["factors"], threads, kernel)
    return call["out"]


@pytest.mark.parametrize("native", BUILT)
def test_kernels_of_a_class_and_any_threads_have_equal_bits(native: ModuleType) -> None:
    first: dict[str, torch.Tensor] = {}
    for name, kernel_class, _ in KERNELS:
        for threads in (1, 3):
            got = inputs_by(native, name, threads)
            assert torch.equal(got, first.setdefault(kernel_class, got))
    values = list(first.values())
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-4, atol=1e-5)
    assert values[0].abs().max() <= 2.5 * 2**0.5 * 4  # clipped, then turned


WRONG: dict[str, dict[str, Any]] = {
    "half a row": {"rows": torch.zeros(H + 1)},
    "a token without room": {"out": torch.zeros(6, OUTPUTS)},
    "a token without angles": {"angles": torch.zeros(6, 2, D // 2)},
    "a norm of another size": {"norm": torch.zeros(H - 1)},
    "weights of another size": {"packed": bytes(4)},
    "head norms of another size": {"head_norms": torch.zeros(D)},
    "an odd head": {"sizes": (H, Q, G, 5, 0, 0, 1, 1, 5, 5)},
    "no head": {"sizes": (H, 0, G, D, 0, 0, 1, 1, D, D)},
    "head norms that divide nothing": {"sizes": (H, Q, G, D, 0, 0, 1, 1, 5, 7)},
    "an unknown norm": {"sizes": (H, Q, G, D, 0, 0, 1, 3, D, D)},
    "an unknown format": {"sizes": (H, Q, G, D, 0, 4, 1, 1, D, D)},
    "a bias that is not there": {"sizes": (H, Q, G, D, 0, 0, 0, 1, D, D)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused(native: ModuleType, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        inputs_by(native, None, **WRONG[wrong])


OUTPUT_SIZES = (24, H, 0, 0, 0, 1)
WRONG_OUTPUTS: dict[str, dict[str, Any]] = {
    "half a row": {"attended": bytes(4 * 25)},
    "a residual too many": {"residual": bytes(4 * H * 3)},
    "too little room": {"sums": 4 * H},
    "too little room for the norm": {"normed": 4 * H},
    "weights of another size": {"packed": bytes(8)},
    "a norm of another size": {"norm": bytes(4)},
    "an unknown norm": {"sizes": (*OUTPUT_SIZES[:5], 0)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", [None, *WRONG_OUTPUTS])
def test_outputs_that_do_not_fit_are_refused(native: ModuleType, wrong: str | None) -> None:
    call: dict[str, Any] = {
        "attended": bytes(4 * 24 * 2),
        "packed": bytes(24 * 64 * 4),
        "residual": bytes(4 * H * 2),
        "norm": bytes(4 * H),
        "sums": 4 * H * 2,
        "normed": 4 * H * 2,
        "sizes": OUTPUT_SIZES,
        **(WRONG_OUTPUTS[wrong] if wrong else {}),
    }
    arguments = (
        *(call[name] for name in ("attended", "packed", "residual", "norm")),
        bytearray(call["sums"]),
        bytearray(call["normed"]),
        call["sizes"],
        1e-5,
        1,
        None,
    )
    if wrong is None:
        native.attention_outputs(*arguments)
        return
    with pytest.raises(ValueError, match=r"."):
        native.attention_outputs(*arguments)


TOKENS, PAGES = 3, 2
HALF: dict[str, Any] = {
    "rows": bytes(4 * H * TOKENS),
    "angles": bytes(4 * D * TOKENS),
    "slots": np.array([1, 2, 3]),
    "spans": np.array([[0, TOKENS, 1, 0]]),
    "pages": np.array([0]),
    "out": bytearray(2 * 4 * H * TOKENS),
}
PARTS: dict[str, Any] = {
    "norm": bytes(4 * H),
    "inputs": bytes(4 * H * 64),
    "head norms": None,
    "input sizes": (H, Q, G, D, 0, 0, 0, 1, 0, 0),
    "input factors": (1e-5, 0.0, 2.5),
    "keys": bytearray(4 * PAGES * 16 * G * D),
    "values": bytearray(4 * PAGES * 16 * G * D),
    "key sizes": (0, 1, PAGES, G, D, OUTPUTS, D),
    "value sizes": (0, 0, PAGES, G, D, OUTPUTS, D),
    "heads": (0, 4, PAGES, G, Q, D),
    "scoring": (0.5, 0.0, 0),
    "sinks": None,
    "kernel": None,
    "output": bytes(4 * Q * D * 64),
    "next norm": bytes(4 * H),
    "output sizes": (Q * D, H, 0, 0, 0, 1),
    "epsilon": 1e-5,
}
WRONG_HALVES: dict[str, dict[str, Any]] = {
    "no token": {"slots": np.array([], np.int64)},
    "a row too few": {"rows": bytes(4 * H * 2)},
    "a slot too few": {"slots": np.array([1, 2])},
    "a slot beyond the cache": {"slots": np.array([1, 2, 16 * PAGES])},
    "a page beyond the cache": {"pages": np.array([PAGES])},
    "a span of other tokens": {"spans": np.array([[0, 2, 1, 0]])},
    "angles too few": {"angles": bytes(4 * D * 2)},
    "room for one row": {"out": bytearray(4 * H * TOKENS)},
    "room that cannot be halved": {"out": bytearray(2 * 4 * H * TOKENS + 1)},
    "no head": {"heads": (0, 4, PAGES, 0, Q, D)},
    "heads without end": {"heads": (0, 4, PAGES, 1 << 16, 1 << 16, 1 << 16)},
    "more heads than are projected": {"heads": (0, 4, PAGES, 2 * G, 2 * Q, D)},
    "values of another size": {"heads": (0, 2, PAGES, G, Q, D)},
    "another cache": {"keys": bytearray(8)},
    "values that nobody can write": {"values": bytes(4 * PAGES * 16 * G * D)},
    "weights of another size": {"output": bytes(4)},
    "no parts": {"parts": ()},
    "parts that are none": {"parts": [None] * len(PARTS)},
}


@pytest.mark.parametrize("native", BUILT)
@pytest.mark.parametrize("wrong", [None, *WRONG_HALVES])
def test_a_half_that_does_not_fit_is_refused(native: ModuleType, wrong: str | None) -> None:
    call = {**HALF, **PARTS, **(WRONG_HALVES[wrong] if wrong else {})}
    parts = call.get("parts", tuple(call[name] for name in PARTS))
    arguments = *(call[name] for name in HALF), parts, 1
    if wrong is None:
        native.attention_half(*arguments)
        return
    with pytest.raises((ValueError, TypeError, BufferError), match=r"."):
        native.attention_half(*arguments)


@pytest.mark.parametrize("native", BUILT)
@torch.inference_mode()
def test_rows_of_another_dtype_than_the_cache_are_refused(
    native: ModuleType, tmp_path: Path
) -> None:
    layer = Layer(tmp_path, save_mixtral, torch.bfloat16)
    half = layer.half()
    *_, paged = layer.attend(half, 0, 5)
    layer.rows = layer.rows.to(torch.float16)
    with pytest.raises(ValueError, match=r"rows are torch\.float16, the cache is torch\.bfloat16"):
        layer.attend(half, 5, 6, paged)
