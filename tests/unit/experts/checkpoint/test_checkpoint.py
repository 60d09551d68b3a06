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
from experts.checkpoint import shards
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.config_checks import MAX_DEPTH
from experts.checkpoint.shards import MAX_HEADER_BYTES, read_header
from experts.checkpoint.stored import resolve_folder
from experts.families.registry import FAMILIES
from tests.checkpoints import save_mixtral
from tests.unit.bomb import EXECUTED, Bomb, pickled_bomb
from workshop.convert.write import open_source

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
INCOMPLETE = "not a complete safetensors file"
DEEP = [b"[" * 100_000, b'{"a": ' * 100_000]
State = dict[str, torch.Tensor]


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A checkpoint in two shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder: Path, names: str, *words: str) -> None:
    """Open a folder that must be refused; the error names the file and says the words.

    It is one short and printable line.
    """
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.field.endswith(names), caught.value
    for word in words:
        assert word in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of the configuration; ``...`` leaves one out."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


def change_tensors(folder: Path, change: Callable[[State], object], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def write_raw(file: Path, header: bytes, data: bytes = b"", size: int | None = None) -> None:
    claimed = len(header) if size is None else size
    file.write_bytes(struct.pack("<Q", claimed) + header + data)


def change_map(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


# Good ones.


def test_a_good_folder_opens_and_tells_its_numbers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    shape = checkpoint.shape
    assert (shape.layers, shape.num_experts, shape.num_experts_per_tok) == ((0, 1, 2), 8, 2)
    assert (shape.hidden_size, shape.intermediate_size, shape.activation) == (64, 96, "silu")
    assert (checkpoint.dtype, checkpoint.vocab_size) == ("float32", 320)
    assert checkpoint.max_position_embeddings == 256
    assert checkpoint.expert_bytes("float32") == 3 * 64 * 96 * 4
    assert checkpoint.expert_bytes("bfloat16") == 3 * 64 * 96 * 2
    assert checkpoint.tensors[EXPERT].shape == (64, 96)
    assert len(checkpoint.tensors) == 3 + 3 * (7 + 3 * 8)
    change_config(folder, hidden_act=...)
    assert open_checkpoint(folder).shape.activation == "silu"
    data, right = (folder / WEIGHTS).read_bytes(), load_file(folder / WEIGHTS)
    for name, info in read_header(folder / WEIGHTS).items():
        assert data[info.begin : info.end] == right.pop(name).numpy().tobytes()
    assert right == {}


def test_a_sharded_folder_opens_and_knows_each_tensors_shard(sharded: Path) -> None:
    (sharded / "a.safetensors").rename(sharded / "blob")
    (sharded / "a.safetensors").symlink_to(sharded / "blob")  # as in the hub's cache
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    checkpoint = open_checkpoint(sharded)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_recognised_and_a_mixture_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    change_tensors(folder, lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    assert open_checkpoint(folder).dtype == str(dtype).removeprefix("torch.")
    change_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT].float()}))
    refused(folder, "model", "mixes the dtypes ", "F32")


def test_tied_embeddings_need_no_output_head_and_may_have_one(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, lambda t: t.pop("lm_head.weight"))
    refused(folder, "model", "lacks 1 tensors: lm_head.weight")
    save_mixtral(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "tied").tensors
    head = {"lm_head.weight": torch.zeros(320, 64)}
    change_tensors(tmp_path / "tied", lambda t: t.update(head))
    assert "lm_head.weight" in open_checkpoint(tmp_path / "tied").tensors


# Hostile and damaged files (promise 16).


@pytest.mark.parametrize("left", [0, 4, 8, 20, 0.5, -1])
def test_a_truncated_file_is_refused(folder: Path, left: float) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, int({0.5: size / 2, -1: size - 1}.get(left, left)))
    refused(folder, WEIGHTS, INCOMPLETE)


@pytest.mark.parametrize("claimed", [99_999_999, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_to_be_huge_is_refused_at_once(folder: Path, claimed: int) -> None:
    write_raw(folder / WEIGHTS, b'{"a":{"dtype":"F32",', size=claimed)
    os.truncate(folder / WEIGHTS, 300_000_000)  # sparse: takes no room on disk
    tracemalloc.start()
    started_s = time.perf_counter()
    try:
        words = f"its header has {claimed} bytes; at most {MAX_HEADER_BYTES}"
        refused(folder, WEIGHTS, INCOMPLETE, words)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started_s < 2


def test_headers_are_bounded_together_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / WEIGHTS).unlink()
    for name in "abc":
        header = b'{"%b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}' % name.encode()
        write_raw(folder / f"{name}.safetensors", header, bytes(4))
    index = {"weight_map": {name: f"{name}.safetensors" for name in "abc"}}
    (folder / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(shards, "MAX_HEADERS_BYTES", 2 * len(header) + 10)
    refused(folder, "c.safetensors", f"{len(header)} bytes; at")
    with pytest.raises(CheckpointError, match=f"{len(header)} bytes; at"):
        open_source(folder)


def entry(shape: str, begin: int, end: int, name: str = "x") -> str:
    place = f'"shape": {shape}, "data_offsets": [{begin}, {end}]'
    return f'"{name}": {{"dtype": "F32", {place}}}'


def two(first: tuple[int, int], second: tuple[int, int], name: str = "y") -> bytes:
    return f"{{{entry('[2]', *first)}, {entry('[2]', *second, name)}}}".encode()


BAD_HEADERS = {
    "huge shape": f"{{{entry('[4294967296, 4294967296, 4294967296]', 0, 0)}}}".encode(),
    "wrapped shape": f"{{{entry('[18446744073709551615, 2]', 0, 8)}}}".encode(),
    "negative shape": f"{{{entry('[-1]', 0, 4)}}}".encode(),
    "too short": f"{{{entry('[2]', 0, 4)}}}".encode(),
    "ends before": f"{{{entry('[1]', 4, 0)}}}".encode(),
    "beyond": f"{{{entry('[1]', 0, 99999999)}}}".encode(),
    "no dtype": b'{"x": {"shape": [1], "data_offsets": [0, 4]}}',
    "unknown dtype": b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    "number": b'{"x": 5}',
    "list": b"[]",
    "text": b"not json",
    "cut": f"{{{entry('[1]', 0, 4)}".encode(),
    "not UTF-8": b"\xff\xfe\xfd",
    "deep": DEEP[0],
    "unprintable": b'{"a\\n' + b"b" * 9000 + b'": {"dtype": "F32"}}',
    "same place": two((0, 8), (0, 8)),
    "overlap": two((0, 8), (4, 12)),
    "hole": two((0, 8), (12, 20)),
    "begins late": two((8, 16), (16, 24)),
    "twice": two((0, 8), (8, 16), "x"),
    "backwards": two((0, 8), (16, 8)),
    "huge": two((0, 8), (8, 2**64 - 1)),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_bad_header_is_refused(folder: Path, kind: str) -> None:
    for num_bytes in (4, 16):
        write_raw(folder / WEIGHTS, BAD_HEADERS[kind], bytes(num_bytes))
        refused(folder, WEIGHTS, INCOMPLETE)


@pytest.mark.parametrize(
    "target",
    ["nothing", "a folder", "nowhere", "b.safetensors", "a pipe", "/dev/zero", "/dev/stdin"],
)
def test_a_shard_that_is_no_file_is_refused_unread(sharded: Path, target: str) -> None:
    shard = sharded / "b.safetensors"
    shard.unlink()
    if target == "a folder":
        shard.mkdir()
    elif target == "a pipe":
        os.mkfifo(shard)
    elif target != "nothing":
        shard.symlink_to(target)
    refused(sharded, "b.safetensors", "missing")


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded: Path) -> None:
    name = next(iter(load_file(sharded / "a.safetensors")))
    change_map(sharded, ghost="a.safetensors")
    refused(sharded, "a.safetensors", "ghost", "as the index says")
    change_map(sharded, **{name: "b.safetensors"})
    refused(sharded, "b.safetensors", name, "as the index says")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 3}])
def test_an_index_without_a_map_is_refused(sharded: Path, index: object) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, "weight_map")


ODD_NAMES: list[object] = [
    *("../secret.safetensors", "/secret.safetensors", "sub/shard.safetensors", "./a.safetensors"),
    *("..", "pytorch_model.bin", "a.safetensors/", "", None, 7, True, 1.5, {"a": "b"}, [[]]),
    *("a\nb.safetensors", "a\0b.safetensors", "\ud800.safetensors", "ä.safetensors"),
    *("x" * 300 + ".safetensors", "~root.safetensors", "C:\\windows\\a.safetensors"),
    *("-rf.safetensors", " a.safetensors"),
]


@pytest.mark.parametrize("shard", ODD_NAMES)
def test_an_index_with_an_odd_file_name_is_refused(folder: Path, shard: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(folder, INDEX, "only plain .safetensors file names")
    with pytest.raises(CheckpointError, match=r"only plain \.safetensors file names"):
        open_source(folder)


def test_pickles_are_refused_by_name_and_run_no_code(folder: Path) -> None:
    pickled = pickled_bomb()
    (folder / WEIGHTS).write_bytes(pickled)
    refused(folder, WEIGHTS, INCOMPLETE)
    torch.save({"x": Bomb()}, folder / WEIGHTS)
    refused(folder, WEIGHTS, INCOMPLETE)
    (folder / WEIGHTS).unlink()
    refused(folder, "model", "neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(pickled)
    refused(folder, "model", "pytorch_model.bin", "pickle", "safetensors")
    assert EXECUTED == []


# Configuration.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is not JSON") for text in (b"", b"{", b"\xff\xfe", b"no", b"{'a': 1}", *DEEP)),
        *((text, "must hold a JSON object") for text in (b"[]", b'"mixtral"', b"3", b"null")),
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(
    folder: Path, text: bytes, words: str
) -> None:
    (folder / CONFIG).write_bytes(text)
    refused(folder, CONFIG, words)


def test_a_configuration_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    file = tmp_path / CONFIG

    def nested(depth: int) -> Path:
        file.write_text('{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
        return file

    assert read_json(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 900):
        with pytest.raises(CheckpointError, match="nested deeper"):
            read_json(nested(depth))


@pytest.mark.parametrize("what", ["absent", "folder", "loop", "pipe", "huge"])
def test_a_configuration_that_cannot_be_read_is_refused(folder: Path, what: str) -> None:
    file = folder / CONFIG
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "huge":
        file.touch()
        os.truncate(file, (16 << 20) + 1)  # sparse: takes no room on disk
    refused(folder, CONFIG, "is larger than 16777216 bytes" if what == "huge" else "")


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
ALL_SIZES = (*SIZES, "num_key_value_heads", "head_dim")
NO_SIZES = (0, -1, -(10**30), "8", 8.0, 8.5, True, [8], {}, float("nan"))
KNOWN = f"known: {', '.join(sorted(FAMILIES))}"
HUGE = ("x" * 100_000, ["x" * 100_000] * 3, 10**4000)


def of_key(key: str, words: tuple[str, ...], *values: object) -> list[Any]:
    return [
        pytest.param(key, value, words, id=f"{key} {str(value)[:20]} {len(str(value))}")
        for value in values
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *of_key("model_type", ("unknown model_type", KNOWN), "llama", "", None, 3, [], {"a": 1}),
        *of_key("architectures", ("unknown architectures", "known: MixtralForCausalLM"),
                ["LlamaForCausalLM"], "MixtralForCausalLM", 3, [{}], [["x"]], {"a": 1}),
        *of_key("quantization_config", ("quantization_config",), {"bits": 4}, "awq", [1]),
        *of_key("hidden_act", ("unknown hidden_act", "silu"),
                "swish9", "", None, 3, ["silu"], {"silu": 1}),
        *of_key("num_experts_per_tok", ("num_experts_per_tok is larger",), 9),
        *(one for key in SIZES for one in of_key(key, (key,), ...)),
        *(one for key in ALL_SIZES for one in of_key(key, ("positive",), *NO_SIZES)),
        *of_key("rms_norm_eps", ("rms_norm_eps", "must be"), float("nan"), "1e-5", -1, [1e-5]),
        *of_key("rope_theta", ("rope_theta", "must be"), 0, float("inf"), {}),
        *of_key("rope_parameters", ("rope_parameters", "must be"), 5,
                {"rope_theta": float("nan"), "rope_type": "default"}),
        *of_key("rope_scaling", ("rope_scaling", "must be"),
                {"type": "linear", "factor": float("inf")}),
        *of_key("tie_word_embeddings", ("tie_word_embeddings must be",), "yes", 1),
        *of_key("sliding_window", ("sliding_window must be",), -1, "4096", 10**30),
        *of_key("num_key_value_heads", ("num_key_value_heads must be",), 3),
        *of_key("num_attention_heads", ("head_dim", "must be even"), 64),
        *of_key("head_dim", ("head_dim", "must be even"), 1, 3),
        *of_key("vocab_size", ("vocab_size must be",), 2**31),
        *(one for key in ("model_type", "architectures", "quantization_config", "hidden_act",
                          "hidden_size", "num_local_experts", "rms_norm_eps", "rope_parameters")
          for one in of_key(key, (), *HUGE)),
    ],
)  # fmt: skip
def test_a_configuration_with_an_odd_value_is_refused_by_its_key(
    folder: Path, key: str, value: object, words: tuple[str, ...]
) -> None:
    change_config(folder, **{key: value})
    refused(folder, CONFIG, *words)


@pytest.mark.parametrize("value", [10**6, 10**9, 10**30])
@pytest.mark.parametrize("key", ALL_SIZES)
def test_an_absurd_size_is_refused_quickly_and_within_little_memory(
    folder: Path, key: str, value: int
) -> None:
    change_config(folder, **{key: value})
    if key == "max_position_embeddings" and value < 2**31:  # no tensor depends on it
        assert open_checkpoint(folder).max_position_embeddings == value
        return
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


# Tensors.


def test_unexpected_tensors_are_named_in_short_and_printable(folder: Path) -> None:
    extra = {f"model.extra.{i}": torch.zeros(1) for i in range(5)}
    long = {"a\n\x1b[31m" + "y" * 10_000: torch.zeros(1)}
    change_tensors(folder, lambda t: t.update(long | extra))
    refused(folder, "model", "has unexpected 6 tensors", r"'a\n\x1b[31m", "model.extra.0", "…")


@pytest.mark.parametrize("shape", [(96, 64), (64, 97), (6144,), (64, 96, 1), (0,), ()])
def test_a_tensor_of_another_shape_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: torch.zeros(shape)}))
    refused(folder, WEIGHTS, EXPERT, str(list(shape)), "[64, 96]")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_a_tensor_of_another_kind_of_number_is_refused(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT].to(dtype)}))
    refused(folder, WEIGHTS, EXPERT, "dtype", "supported: F32, BF16, F16")


# Where folders are looked for.


def test_a_folder_is_found_by_absolute_path_or_in_the_deploy_package(folder: Path) -> None:
    assert resolve_folder(str(folder)) == folder
    assert open_checkpoint(resolve_folder("models/mesh-tiny")).family.model_type == "mixtral"
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(str(folder / CONFIG))


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-folder", "../../etc", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused_by_name(path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_folder(path)
    assert caught.value.field == path
