"""The native attention of a layer against transformers' modules, and models that it does not fit.

Dimension letters: T tokens, H hidden size, D head size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.device import CPU
from cluster.native import native
from cluster.wire.tensors import TORCH_DTYPES
from experts.checkpoint.checkpoint import open_checkpoint
from router.model.attention.interface import PagedBatch, Span
from router.model.attention.paged import PagedContext
from router.model.attention_choice import choose_attention, make_cache
from router.model.cpu import native_attention, native_layer, native_modules
from router.model.cpu.llama_shape import has_llamas_shape
from router.model.cpu.native_attention import NativeAttention
from router.model.cpu.native_layer import NativeAttentionHalf, NativeGate, NativeRotation
from router.model.decoder import MoEFeedForward
from router.model.model import MoEModel, load_dense
from router.model.page_pool import pages_needed
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request

assert native is not None
NAMES = ("qwen2_moe", "qwen3_moe", "olmoe", "dbrx", "gpt_oss")
LLAMAS: dict[str, Callable[..., Any]] = {
    "mixtral": save_mixtral,
    **{name: SAVERS[name] for name in NAMES},
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
        size = self.checkpoint.shape.hidden_size
        self.rows = torch.randn(NUM_TOKENS, size, generator=generator).to(dtype)
        self.rotary_embedding = base.rotary_emb

    def paged(self, dtype: torch.dtype) -> PagedContext:
        """Return the context of a sequence of all tokens, in an empty cache of a dtype."""
        family, config = self.checkpoint.family, self.model.config
        attention = choose_attention(family, config, None, dtype, CPU)
        num_pages = pages_needed(64, attention.page_size)
        cache = make_cache(attention, family, config, num_pages, dtype, CPU)
        slots = np.arange(NUM_TOKENS)
        batch = PagedBatch(torch.from_numpy(slots), attention.view([Span(slots, 0)], 0))
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
            paged=self.paged(dtype),
        )[0]
        residual = rows + attended
        return residual[0], next_norm(residual)[0]

    def attend(
        self,
        rows: torch.Tensor,
        output: torch.Tensor | None = None,
        paged: PagedContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream and the normed rows."""
        half = NativeAttentionHalf(self.norm, self.attention, self.next_norm)
        rotate = NativeRotation(self.rotary_embedding, self.attention.head_dim)
        angles = rotate(self.rows, torch.arange(NUM_TOKENS)[None])
        return rows, half(rows, output, angles, paged or self.paged(self.rows.dtype))


def parts_of(layer: Any) -> tuple[nn.Module, Any, nn.Module]:
    if hasattr(layer, "norm_attn_norm"):
        both = layer.norm_attn_norm
        return both.norm_1, both.attn, both.norm_2
    return layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LLAMAS)
@torch.inference_mode()
def test_it_is_transformers_attention(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    layer = Layer(tmp_path, LLAMAS[family], dtype)
    assert has_llamas_shape(layer.norm, layer.attention, layer.next_norm)
    got = layer.attend(layer.rows.clone())
    exact, rounded = layer.transformers(torch.float32), layer.transformers(dtype)
    for index in range(2):
        assert got[index].dtype == dtype
        off = (got[index].float() - exact[index]).norm()
        theirs = (rounded[index].float() - exact[index]).norm()
        assert off <= max(1.1 * theirs, 1e-5 * exact[index].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_the_last_layers_output_is_added_as_torch_adds_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    layer = Layer(tmp_path, save_mixtral, dtype)
    output = torch.randn(layer.rows.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    added = layer.attend(layer.rows.clone(), output)
    expected = layer.attend(layer.rows + output)
    assert all(map(torch.equal, added, expected))
    assert not torch.equal(added[0], layer.attend(layer.rows.clone())[0])


@pytest.mark.parametrize("save", [save_mixtral, SAVERS["gpt_oss"]])
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


@pytest.mark.parametrize("save", [SAVERS["deepseek_v2"], SAVERS["deepseek_v3"]])
def test_latent_attention_has_another_shape(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path)
    layer = load_dense(open_checkpoint(tmp_path), torch.float32).base_model.layers[1]
    assert not has_llamas_shape(*parts_of(layer))


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
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    SAVERS["qwen3_moe"](tmp_path)
    layer = load_dense(open_checkpoint(tmp_path), torch.float32).base_model.layers[1]
    assert has_llamas_shape(*parts_of(layer))
    change(layer.self_attn)
    assert not has_llamas_shape(*parts_of(layer))


@torch.inference_mode()
def test_a_half_has_the_threads_of_its_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, asked = Layer(tmp_path, save_mixtral, torch.float32), []
    half = SimpleNamespace(attention_half=lambda *args: asked.append(args[-1]))
    monkeypatch.setattr(native_layer, "native", half)
    paged = layer.paged(torch.float32)
    for threads in (1, 3):
        batch = replace(paged.batch, view=replace(paged.batch.view, threads=threads))
        layer.attend(layer.rows.clone(), paged=replace(paged, batch=batch))
    assert asked == [1, 3]


def test_a_model_attends_with_the_threads_that_it_is_given(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_hidden_layers=1)
    cluster = LocalCluster(tmp_path, threaded=False)
    model = MoEModel(cluster.checkpoint, torch.float32, 1000, cluster.layers, CPU, 40)
    assert isinstance(model.attention, NativeAttention)
    assert model.attention.view([Span(np.arange(700), 600)], 0).threads == 40


@torch.inference_mode()
def test_rows_of_another_dtype_than_the_cache_are_refused(tmp_path: Path) -> None:
    layer = Layer(tmp_path, save_mixtral, torch.bfloat16)
    with pytest.raises(ValueError, match=r"rows are torch\.float16, the cache is torch\.bfloat16"):
        layer.attend(layer.rows.to(torch.float16))


@torch.inference_mode()
def test_a_residual_stream_that_would_be_copied_is_refused(tmp_path: Path) -> None:
    layer = Layer(tmp_path, save_mixtral, torch.bfloat16)
    with pytest.raises(ValueError, match="contiguous"):
        layer.attend(layer.rows.t().contiguous().t())


def generated(cluster: LocalCluster) -> tuple[int, ...]:
    [[event]] = cluster.generate(greedy_request("r", [5, 9, 7], 6))
    cluster.close()
    return event.token_ids


def gates_of(cluster: LocalCluster) -> list[Any]:
    halves = [layer.feed_forward for layer in cluster.model.decoder._layers]
    return [half._gate for half in halves if isinstance(half, MoEFeedForward)]


@pytest.mark.parametrize("save", [save_mixtral, SAVERS["deepseek_v3"]])
@pytest.mark.parametrize(
    ("module", "limit"),
    [(native_attention, "MAX_HEADS"), (native_layer, "MAX_EXPERTS"), (native_modules, "MAX_SIZE")],
)
def test_a_size_beyond_native_code_goes_to_torch_with_the_same_tokens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    limit: str,
    save: Callable[[Path], Any],
) -> None:
    save(tmp_path)
    expected = generated(LocalCluster(tmp_path, dtype="float32"))
    monkeypatch.setattr(module, limit, 3)
    cluster = LocalCluster(tmp_path, dtype="float32")
    assert isinstance(cluster.model.attention, NativeAttention) == (limit != "MAX_HEADS")
    are_native = [isinstance(gate, NativeGate) for gate in gates_of(cluster)]
    assert are_native == [limit != "MAX_EXPERTS"] * len(are_native)
    assert not cluster.model.is_native
    assert cluster.model.is_independent == (limit == "MAX_EXPERTS")
    assert generated(cluster) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exponent", [1.0, 2.0, None])
def test_a_gate_that_native_code_does_not_know_has_native_logits(
    tmp_path: Path, exponent: float | None, dtype: str
) -> None:
    """So a token's experts and weights have the same bits in any company there, too."""
    SAVERS["dbrx"](tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["ffn_config"]["moe_normalize_expert_weights"] = exponent
    file.write_text(json.dumps(config))
    cluster = LocalCluster(tmp_path, dtype=dtype)
    is_known = exponent != 2.0
    assert cluster.model.is_native == is_known
    assert cluster.model.is_independent
    [gate, *_] = gates_of(cluster)
    assert isinstance(gate, NativeGate) == is_known
    size = cluster.checkpoint.shape.hidden_size
    rows = torch.randn(40, size, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[dtype])
    choice = gate.choice(rows)
    for t in range(len(rows)):
        alone = gate.choice(rows[t : t + 1])
        assert np.array_equal(alone.ids[0], choice.ids[t])
        assert torch.equal(alone.weights[0], choice.weights[t])
    cluster.close()
