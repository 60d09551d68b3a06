"""A router's model: transformers' own but for the experts, which it neither holds nor reads."""

from __future__ import annotations

import ctypes
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralForCausalLM
from transformers.models.mixtral import modeling_mixtral

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from router.model.model import load_dense
from router.model.parts import RemoteExperts, take_gates, torch_attention
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(path)
    return path


def dense_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.state_dict().items() if ".experts." not in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_part_is_transformers_own(folder: Path, dtype: torch.dtype) -> None:
    whole = MixtralForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = load_dense(open_checkpoint(folder), dtype).state_dict()
    expected = dense_parameters(whole)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save_mixtral(tmp_path, tie_word_embeddings=True)
    model = load_dense(open_checkpoint(tmp_path), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_parameter_is_an_experts(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = load_dense(checkpoint, torch.float32)
    hidden, inner = checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size
    tensors = [*model.parameters(), *model.buffers()]
    assert not any({inner, 2 * inner} & set(tensor.shape) for tensor in tensors)
    replaced = [m for m in model.modules() if isinstance(m, RemoteExperts)]
    assert len(replaced) == 3
    assert [list(m.parameters()) + list(m.buffers()) for m in replaced] == [[], [], []]
    expected = sum(
        torch.Size(shape).numel()
        for shape in checkpoint.family.dense_tensors(checkpoint.config).values()
    )
    assert sum(p.numel() for p in model.parameters()) == expected
    assert hidden < inner  # or the first assertion says nothing


def test_nothing_is_trained_and_everything_is_in_evaluation_mode(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_transformers_own_class_is_put_back_even_after_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_mixtral.MixtralExperts
    load_dense(open_checkpoint(folder), torch.float32)
    assert modeling_mixtral.MixtralExperts is original
    import transformers

    def fails(*_: object, **__: object) -> None:
        assert modeling_mixtral.MixtralExperts is RemoteExperts
        raise RuntimeError("a fault of the test's")

    monkeypatch.setattr(transformers.MixtralForCausalLM, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="a fault of the test's"):
        load_dense(open_checkpoint(folder), torch.float32)
    assert modeling_mixtral.MixtralExperts is original


def test_each_layers_experts_know_their_layer_and_hold_its_gate(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    take_gates(model, open_checkpoint(folder))
    replaced = [m for m in model.modules() if isinstance(m, RemoteExperts)]
    assert [m.layer_id for m in replaced] == [0, 1, 2]
    assert len({m.gate for m in replaced} - {None}) == 3
    assert not any("gate" in name for name, _ in model.named_parameters())


def test_a_model_with_another_number_of_mixtures_is_refused(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    del model.model.layers[1]
    with pytest.raises(CheckpointError, match="2 expert modules were replaced, 3 expected"):
        take_gates(model, open_checkpoint(folder))


def test_a_layer_with_unknown_parts_is_refused(folder: Path) -> None:
    model = load_dense(open_checkpoint(folder), torch.float32)
    del model.model.layers[1].self_attn
    with pytest.raises(CheckpointError, match="MixtralDecoderLayer has unknown parts"):
        torch_attention(model.model.layers[1])


def test_a_checkpoint_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    with safe_open(tmp_path / "model.safetensors", "pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys() if key != name}  # noqa: SIM118
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        load_dense(checkpoint, torch.float32)


def move_experts(folder: Path, fill: int | None, inner: int | None = None) -> int:
    """Move all experts to a shard of their own whose data is nothing but ``fill`` bytes.

    ``None`` leaves the data a hole that takes no room on disk; ``inner`` gives the experts another
    intermediate size. Returns the bytes of the experts' data.
    """
    single = folder / "model.safetensors"
    with safe_open(single, "pt") as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    single.unlink()
    dense = {n: t for n, t in tensors.items() if ".experts." not in n}
    save_file(dense, folder / "dense.safetensors", {"format": "pt"})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if name in dense:
            continue
        old = json.loads((folder / "config.json").read_text())["intermediate_size"]
        shape = [inner if inner and size == old else size for size in tensor.shape]
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "experts.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        if fill is not None:
            file.write(bytes([fill]) * end)
        file.truncate(8 + len(raw) + end)
    weight_map = {n: "dense.safetensors" if n in dense else "experts.safetensors" for n in tensors}
    index = {"metadata": {"total_size": end}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if inner:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": inner}))
    return end


def test_the_experts_values_have_no_part_in_the_routers_model(tmp_path: Path) -> None:
    expected = dense_parameters(save_mixtral(tmp_path))
    move_experts(tmp_path, fill=0xFF)  # each of them a NaN
    loaded = load_dense(open_checkpoint(tmp_path), torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def peak_mb(act: Callable[[], object]) -> float:
    """Return by how much a call raises the most memory that this process has in use at once."""
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now

    def most_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    before_mb = most_mb()
    act()
    return most_mb() - before_mb


def test_loading_a_router_takes_no_memory_for_the_experts(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    experts_mb = move_experts(tmp_path, fill=None, inner=9000) / 2**20
    checkpoint = open_checkpoint(tmp_path)

    def load_whole() -> None:
        model = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert sum(float(p.detach().sum()) for p in model.parameters())

    # A page of a mapped file counts as soon as it is read, so this says "unread" as well.
    assert peak_mb(lambda: load_dense(checkpoint, torch.float32)) < experts_mb / 10
    # The measurement sees experts where there are some.
    assert peak_mb(load_whole) > experts_mb > 150


def test_a_token_attends_to_so_many_others_at_the_cost_of_its_products(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_hidden_layers=2)
    attention, gate, experts = 2 * 64 * 64 + 2 * 64 * 32, 64 * 8, 2 * 3 * 64 * 96
    norms = 2 * 2 * 64 + 64
    weights = 2 * (attention + gate + experts) + norms
    assert LocalCluster(tmp_path, threaded=False).model.even_context == weights / (2 * 4 * 2 * 16)


def test_windows_that_bound_all_layers_make_no_token_dearer(tmp_path: Path) -> None:
    save_mixtral(tmp_path, num_hidden_layers=1, sliding_window=32)
    assert LocalCluster(tmp_path, threaded=False).model.even_context == math.inf
