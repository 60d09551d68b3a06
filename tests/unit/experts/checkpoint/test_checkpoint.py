"""Checkpoint folders: good ones open, every damaged or hostile one is a CheckpointError."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.stored import resolve_folder
from experts.families.registry import FAMILIES
from tests.unit.bomb import EXECUTED, Bomb, pickled_bomb

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    family = FAMILIES["mixtral"]
    shapes = family.dense_tensors(config)
    parts = family.expert_parts(config, family.expert_shape(config))
    shapes |= {part.name: part.shape for part in parts}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def save(folder: Path, **changes: Any) -> Path:
    """Save a whole checkpoint in one file; ``changes`` go into its configuration."""
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(config), folder / WEIGHTS)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in two shards with an index."""
    folder = save(tmp_path / "sharded")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder: Path, names: str, *words: str) -> CheckpointError:
    """Open a folder that must be refused; the error names the file and says the words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.field.endswith(names), caught.value
    for word in words:
        assert word in caught.value.message
    assert "\n" not in str(caught.value)
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS
) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def write_raw(file: Path, header: bytes, data: bytes = b"", size: int | None = None) -> None:
    claimed = len(header) if size is None else size
    file.write_bytes(struct.pack("<Q", claimed) + header + data)


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# Good ones.


def test_a_good_folder_opens_and_tells_its_numbers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shape.layers == (0, 1)
    assert (checkpoint.shape.num_experts, checkpoint.shape.num_experts_per_tok) == (3, 2)
    assert (checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size) == (8, 12)
    assert (checkpoint.dtype, checkpoint.vocab_size) == ("float32", 32)
    assert checkpoint.max_position_embeddings == 64
    assert checkpoint.expert_bytes("float32") == 3 * 8 * 12 * 4
    assert checkpoint.expert_bytes("bfloat16") == 3 * 8 * 12 * 2
    assert checkpoint.tensors[EXPERT].shape == (8, 12)
    assert len(checkpoint.tensors) == 3 + 2 * (7 + 3 * 3)


def test_a_sharded_folder_opens_and_knows_each_tensors_shard(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_recognised(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    assert open_checkpoint(folder).dtype == str(dtype).removeprefix("torch.")


def test_shards_may_be_links_to_files_elsewhere_as_in_the_hubs_cache(
    folder: Path, tmp_path: Path
) -> None:
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert open_checkpoint(folder).vocab_size == 32


@pytest.mark.parametrize("with_head", [True, False])
def test_tied_embeddings_need_no_output_head_and_may_have_one(
    tmp_path: Path, with_head: bool
) -> None:
    folder = save(tmp_path / "tied", tie_word_embeddings=True)
    if with_head:
        change_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(32, 8)}))
    assert ("lm_head.weight" in open_checkpoint(folder).tensors) == with_head


def test_without_tied_embeddings_the_output_head_is_needed(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop("lm_head.weight"))
    refused(folder, "model", "lacks 1 tensors: lm_head.weight")


def test_missing_hidden_act_means_silu(folder: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "hidden_act"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).shape.activation == "silu"


# Hostile and damaged files (promise 16).


@pytest.mark.parametrize("left", [0, 4, 8, 20, 0.5, -1])
def test_a_truncated_file_is_refused(folder: Path, left: float) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, int({0.5: size / 2, -1: size - 1}.get(left, left)))
    refused(folder, WEIGHTS, "not a complete safetensors file")


@pytest.mark.parametrize("claimed", [99_999_999, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_to_be_huge_is_refused_at_once(folder: Path, claimed: int) -> None:
    write_raw(folder / WEIGHTS, b"{}", size=claimed)
    tracemalloc.start()
    started_s = time.perf_counter()
    try:
        refused(folder, WEIGHTS, "not a complete safetensors file")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started_s < 2


@pytest.mark.parametrize(
    "header",
    [
        b'{"x": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], '
        b'"data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999]}}',
        b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": 5}',
        b"[]",
        b"not json",
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
    ],
)
def test_a_bad_header_is_refused(folder: Path, header: bytes) -> None:
    write_raw(folder / WEIGHTS, header, b"\0" * 4)
    refused(folder, WEIGHTS, "not a complete safetensors file")


@pytest.mark.parametrize("what", ["absent", "folder", "dangling", "loop"])
def test_a_missing_shard_is_refused(sharded: Path, what: str) -> None:
    shard = sharded / "b.safetensors"
    shard.unlink()
    if what == "folder":
        shard.mkdir()
    elif what != "absent":
        shard.symlink_to(shard.name if what == "loop" else "nowhere")
    refused(sharded, "b.safetensors", "missing")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    name = next(iter(load_file(sharded / "a.safetensors")))
    change_tensors(sharded, lambda t: t.update({name: torch.zeros(1)}), "b.safetensors")
    refused(sharded, "b.safetensors", name, "also in a.safetensors")


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded: Path) -> None:
    name = next(iter(load_file(sharded / "a.safetensors")))
    change_index(sharded, lambda weight_map: weight_map.update({name: "b.safetensors"}))
    refused(sharded, "b.safetensors", name, "as the index says")


def test_an_index_that_lists_a_tensor_nobody_has_is_refused(sharded: Path) -> None:
    change_index(sharded, lambda weight_map: weight_map.update({"ghost": "a.safetensors"}))
    refused(sharded, "a.safetensors", "ghost", "as the index says")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 3}])
def test_an_index_without_a_map_is_refused(sharded: Path, index: object) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, "weight_map")


def test_pickle_weights_alone_are_refused_by_name(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled_bomb())
    refused(folder, "model", "pytorch_model.bin", "pickle", "safetensors")
    assert EXECUTED == []


def test_a_pickle_that_is_named_safetensors_is_refused_and_runs_no_code(folder: Path) -> None:
    pickled = pickled_bomb()
    (folder / WEIGHTS).write_bytes(pickled)
    refused(folder, WEIGHTS, "not a complete safetensors file")
    torch.save({"x": Bomb()}, folder / WEIGHTS)
    refused(folder, WEIGHTS, "not a complete safetensors file")
    assert EXECUTED == []


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, "model", "neither model.safetensors nor")


# Configuration.


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"not json", b"[" * 100_000, b'{"a": ' * 100_000, b"{'a': 1}"],
)
def test_a_configuration_that_is_not_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json", "is not JSON")


@pytest.mark.parametrize("value", [[], "mixtral", 3, None, [CONFIG]])
def test_a_configuration_that_is_no_object_is_refused(folder: Path, value: object) -> None:
    (folder / "config.json").write_text(json.dumps(value))
    refused(folder, "config.json", "must hold a JSON object")


@pytest.mark.parametrize("what", ["absent", "folder", "loop", "pipe"])
def test_a_configuration_that_cannot_be_read_is_refused(folder: Path, what: str) -> None:
    file = folder / "config.json"
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "pipe":
        os.mkfifo(file)
    refused(folder, "config.json")


def test_a_huge_configuration_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "config.json", 1 << 40)  # sparse: takes no room on disk
    refused(folder, "config.json", "is larger than")


@pytest.mark.parametrize("model_type", ["llama", "", None, 3, [], {"a": 1}])
def test_an_unknown_model_type_is_refused_with_the_known_ones(
    folder: Path, model_type: object
) -> None:
    change_config(folder, model_type=model_type)
    refused(folder, "config.json", "unknown model_type", f"known: {', '.join(sorted(FAMILIES))}")


@pytest.mark.parametrize(
    "architectures", [["LlamaForCausalLM"], "MixtralForCausalLM", 3, [{}], [["x"]], {"a": 1}]
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(
    folder: Path, architectures: object
) -> None:
    change_config(folder, architectures=architectures)
    refused(folder, "config.json", "unknown architectures", "known: MixtralForCausalLM")


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"bits": 4}, "must be fp8 or mxfp4 (given: None)"),
        ("awq", "quant"),
        ([1], "quant"),
    ],
)
def test_a_quantised_checkpoint_is_refused(folder: Path, quantization: object, word: str) -> None:
    change_config(folder, quantization_config=quantization)
    refused(folder, "config.json", "quantization_config", word)


@pytest.mark.parametrize("hidden_act", ["swish9", "", None, 3, ["silu"], {"silu": 1}])
def test_an_unknown_activation_is_refused_with_the_known_ones(
    folder: Path, hidden_act: object
) -> None:
    change_config(folder, hidden_act=hidden_act)
    refused(folder, "config.json", "unknown hidden_act", "silu")


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", SIZES)
def test_a_configuration_that_lacks_a_size_is_refused(folder: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json", key)


@pytest.mark.parametrize("value", [0, -1, -(10**30), "8", 8.0, 8.5, True, [8], {}, float("nan")])
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim"])
def test_a_size_that_is_no_positive_integer_is_refused(
    folder: Path, key: str, value: object
) -> None:
    change_config(folder, **{key: value})
    refused(folder, "config.json", "positive")


@pytest.mark.parametrize("value", [10**6, 10**9, 10**30])
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim"])
def test_an_absurd_size_is_refused_quickly_and_within_little_memory(
    folder: Path, key: str, value: int
) -> None:
    if key == "max_position_embeddings" and value < 2**31:  # no tensor depends on it
        change_config(folder, **{key: value})
        assert open_checkpoint(folder).max_position_embeddings == value
        return
    change_config(folder, **{key: value})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_more_experts_per_token_than_experts_are_refused(folder: Path) -> None:
    change_config(folder, num_experts_per_tok=4)
    refused(folder, "config.json", "num_experts_per_tok is larger")


# Tensors.


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop(EXPERT))
    refused(folder, "model", "lacks 1 tensors", EXPERT)


def test_unexpected_tensors_are_named(folder: Path) -> None:
    extra = {f"model.extra.{i}": torch.zeros(1) for i in range(5)}
    change_tensors(folder, lambda t: t.update(extra))
    refused(folder, "model", "has unexpected 5 tensors", "model.extra.0", "…")


@pytest.mark.parametrize("shape", [(12, 8), (8, 13), (96,), (8, 12, 1), (0,), ()])
def test_a_tensor_of_another_shape_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: torch.zeros(shape)}))
    refused(folder, WEIGHTS, EXPERT, str(list(shape)), "[8, 12]")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_a_tensor_of_another_kind_of_number_is_refused(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT].to(dtype)}))
    refused(folder, WEIGHTS, EXPERT, "dtype", "supported: F32, BF16, F16")


def test_a_mixture_of_dtypes_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}))
    refused(folder, "model", "mixes the dtypes BF16, F32")


# Where folders are looked for.


def test_a_folder_is_found_by_absolute_path_or_in_the_deploy_package(folder: Path) -> None:
    assert resolve_folder(str(folder)) == folder
    assert open_checkpoint(resolve_folder("models/mesh-tiny")).family.model_type == "mixtral"


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-folder", "../../etc", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused_by_name(path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_folder(path)
    assert caught.value.field == path


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(str(folder / "config.json"))
