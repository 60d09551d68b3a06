"""``expertmesh convert``: every layout gives back the model's bits, and nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from experts.checkpoint.checkpoint import open_checkpoint
from router.cli.app import app
from tests import foreign_layouts as foreign
from tests.checkpoints import save_mixtral
from workshop.convert import write

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Original:
    """A random model in the layout that is served."""

    folder: Path
    model: MixtralForCausalLM
    state: State

    @property
    def config(self) -> MixtralConfig:
        return self.model.config


def make(folder: Path, dtype: torch.dtype) -> Original:
    rope = {"rope_type": "default", "rope_theta": 5_000.0}
    save_mixtral(
        folder,
        dtype,
        rope_parameters=rope,
        rms_norm_eps=1e-3,
        num_hidden_layers=2,
        num_local_experts=4,
    )
    return Original(folder, loaded(folder), load_file(folder / "model.safetensors"))


def loaded(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make(tmp_path_factory.mktemp("fp32") / "original", torch.float32)


@pytest.fixture(scope="module")
def original_bf16(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make(tmp_path_factory.mktemp("bf16") / "original", torch.bfloat16)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def converted(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def state_of(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def assert_same_state(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_logits(folder: Path, model: MixtralForCausalLM) -> None:
    theirs = loaded(folder)
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)


class Style(NamedTuple):
    block: str
    stacked: bool
    num_files: int


@pytest.mark.parametrize(
    "style",
    [
        Style("block_sparse_moe", False, 1),
        Style("feed_forward", False, 3),
        Style("block_sparse_moe", True, 1),
    ],
    ids=str,
)
def test_mistral_files_give_the_same_bits_and_logits(
    original: Original, tmp_path: Path, style: Style
) -> None:
    tensors = foreign.mistral_tensors(original.config, original.state, style.block, style.stacked)
    foreign.write_mistral(tmp_path / "in", original.config, tensors, style.num_files)
    done = converted(tmp_path / "in", tmp_path / "out")
    assert (done["layout"], done["dtype"], done["num_shards"]) == ("mistral", "float32", 1)
    assert_same_state(state_of(tmp_path / "out"), original.state)
    assert_same_logits(tmp_path / "out", original.model)


@pytest.mark.parametrize("stacked", [True, False])
def test_gguf_in_fp32_gives_the_same_bits_and_logits(
    original: Original, tmp_path: Path, stacked: bool
) -> None:
    foreign.write_gguf(tmp_path / "in.gguf", original.config, original.state, stacked=stacked)
    assert converted(tmp_path / "in.gguf", tmp_path / "out")["layout"] == "gguf"
    assert_same_state(state_of(tmp_path / "out"), original.state)
    assert_same_logits(tmp_path / "out", original.model)
    assert open_checkpoint(tmp_path / "out").config["max_position_embeddings"] == 256


def test_gguf_in_bf16_with_fp32_norms_becomes_bf16(original_bf16: Original, tmp_path: Path) -> None:
    foreign.write_gguf(
        tmp_path / "in.gguf", original_bf16.config, original_bf16.state, foreign.packed_bf16
    )
    done = converted(tmp_path / "in.gguf", tmp_path / "out")
    assert (done["source_dtypes"], done["dtype"]) == (["bfloat16", "float32"], "bfloat16")
    assert_same_state(state_of(tmp_path / "out"), original_bf16.state)
    assert_same_logits(tmp_path / "out", original_bf16.model)


def test_quantised_gguf_is_dequantised(original: Original, tmp_path: Path) -> None:
    foreign.write_gguf(tmp_path / "in.gguf", original.config, original.state, foreign.packed_q8)
    wanted = {
        name: foreign.q8_values(tensor) if tensor.dim() > 1 else tensor
        for name, tensor in original.state.items()
    }
    converted(tmp_path / "in.gguf", tmp_path / "fp32", "--dtype", "float32")
    assert_same_state(state_of(tmp_path / "fp32"), wanted)
    assert converted(tmp_path / "in.gguf", tmp_path / "auto")["dtype"] == "bfloat16"
    assert_same_state(
        state_of(tmp_path / "auto"), {name: tensor.bfloat16() for name, tensor in wanted.items()}
    )


def test_dtype_and_shard_size_of_the_same_layout(original: Original, tmp_path: Path) -> None:
    done = converted(
        original.folder, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100KB"
    )
    assert done["num_shards"] > 3
    state = {name: tensor.bfloat16() for name, tensor in original.state.items()}
    assert_same_state(state_of(tmp_path / "out"), state)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.dtype == "bfloat16"
    assert opened.config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original.folder / name).read_bytes()
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert max(sizes) < 110_000
    # and back from shards: what bf16 has cut off stays cut off
    converted(tmp_path / "out", tmp_path / "back", "--dtype", "float32")
    wanted = {name: tensor.float() for name, tensor in state.items()}
    assert_same_state(state_of(tmp_path / "back"), wanted)


def test_tokenizer_is_copied_or_said_to_be_missing(original: Original, tmp_path: Path) -> None:
    foreign.write_gguf(tmp_path / "in.gguf", original.config, original.state)
    without = run(tmp_path / "in.gguf", tmp_path / "without")
    assert "no tokenizer.json beside the source" in without.stdout
    shutil.copy(original.folder / "tokenizer.json", tmp_path)
    with_it = run(tmp_path / "in.gguf", tmp_path / "with")
    assert "no tokenizer.json" not in with_it.stdout
    assert (tmp_path / "with" / "tokenizer.json").exists()


SHARDS = ("--max-shard-size", "100KB")


def break_off(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """Press Ctrl-C at the tensor ``after`` so many; returns a counter of tensors read."""
    reads = 0
    real = write.read

    def read(*arguments: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads > after:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(write, "read", read)
    return lambda: reads


def broken_off(original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        break_off(patch, after=25)
        return run(original.folder, tmp_path / "out", *SHARDS)


def test_ctrl_c_keeps_whole_shards_and_says_how_to_go_on(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = broken_off(original, tmp_path, monkeypatch)
    assert result.exit_code == 130
    assert not (tmp_path / "out").exists()
    kept = sorted((tmp_path / ".out.converting" / "model").iterdir())
    assert f"is kept in {tmp_path / '.out.converting'}: run the same command" in result.stderr
    before = {file.name: file.stat().st_ino for file in kept}
    reads = break_off(monkeypatch, after=10_000)
    done = converted(original.folder, tmp_path / "out", *SHARDS)
    assert done["kept_shards"] == len(before) > 0
    assert reads() < len(original.state)
    after = {name: (tmp_path / "out" / name).stat().st_ino for name in before}
    assert after == before
    assert_same_state(state_of(tmp_path / "out"), original.state)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_before_the_first_shard(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_off(monkeypatch, after=1)
    result = run(original.folder, tmp_path / "out")
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_written_again(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(original, tmp_path, monkeypatch)
    first, *others = sorted((tmp_path / ".out.converting" / "model").glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    (first.parent / "left-over.tmp").write_text("of a killed run")
    done = converted(original.folder, tmp_path / "out", *SHARDS)
    assert done["kept_shards"] == len(others)
    assert_same_state(state_of(tmp_path / "out"), original.state)
    assert not (tmp_path / "out" / "left-over.tmp").exists()


def test_another_dtype_begins_anew(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(original, tmp_path, monkeypatch)
    done = converted(original.folder, tmp_path / "out", *SHARDS, "--dtype", "bfloat16")
    assert done["kept_shards"] == 0


def test_a_changed_source_begins_anew(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Original(
        shutil.copytree(original.folder, tmp_path / "in"), original.model, original.state
    )
    broken_off(source, tmp_path, monkeypatch)
    changed = {name: tensor + 1 for name, tensor in original.state.items()}
    save_file(changed, source.folder / "model.safetensors")
    done = converted(source.folder, tmp_path / "out", *SHARDS)
    assert done["kept_shards"] == 0
    assert_same_state(state_of(tmp_path / "out"), changed)


def test_a_source_that_changes_meanwhile_is_refused(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(original.folder, tmp_path / "in")
    real = write.read

    def read(*arguments: Any) -> torch.Tensor:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(write, "read", read)
    result = run(source, tmp_path / "out")
    assert result.exit_code == 2
    assert "changed in the meantime" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_disk_that_takes_no_more_keeps_what_is_whole(original: Original, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = run(original.folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert "run the same command again" in result.stderr
    assert not (tmp_path / "out").exists()
    converted(original.folder, tmp_path / "out")
    assert_same_state(state_of(tmp_path / "out"), original.state)


def test_too_little_room_is_said_before_writing(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    result = run(original.folder, tmp_path / "out")
    assert result.exit_code == 1
    assert "are free on its disk" in result.stderr


def test_a_place_where_no_folder_can_be_made(original: Original, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(original.folder, tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot be created: Not a directory" in result.stderr


def test_two_conversions_to_the_same_place(original: Original, tmp_path: Path) -> None:
    staging = tmp_path / ".out.converting"
    staging.mkdir()
    other = os.open(staging, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        result = run(original.folder, tmp_path / "out")
    finally:
        os.close(other)
    assert result.exit_code == 1
    assert "another command is using this folder" in result.stderr


def test_dest_may_be_empty_but_must_hold_nothing(original: Original, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    converted(original.folder, tmp_path / "empty")
    again = run(original.folder, tmp_path / "empty")
    assert again.exit_code == 2
    assert "DEST must be new or empty" in again.stderr
    (tmp_path / "file").write_text("mine")
    onto_a_file = run(original.folder, tmp_path / "file")
    assert onto_a_file.exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    (folder / name).write_bytes(b"never read")
    for source in (folder, folder / name):
        result = run(source, tmp_path / "out")
        assert result.exit_code == 2
        assert name in result.stderr
        assert "pickle" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for source, said in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "is not a known layout"),
        (tmp_path / "text.txt", "is not a known layout"),
        (tmp_path / "cut.gguf", "is not a complete GGUF file"),
    ):
        result = run(source, tmp_path / "out")
        assert result.exit_code == 2, source
        assert said in result.stderr
        assert result.stderr.strip().count("\n") == 0


def refused(original: Original, tmp_path: Path, tensors: State, num_files: int = 1) -> str:
    foreign.write_mistral(tmp_path / "in", original.config, tensors, num_files)
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return result.stderr


@pytest.fixture
def tensors(original: Original) -> State:
    return foreign.mistral_tensors(original.config, original.state, "feed_forward", stacked=False)


def test_missing_tensors_are_named(original: Original, tmp_path: Path, tensors: State) -> None:
    del tensors["layers.1.attention.wq.weight"]
    assert "lacks tensors: layers.1.attention.wq.weight" in refused(original, tmp_path, tensors)


def test_missing_tensors_of_gguf_are_named(original: Original, tmp_path: Path) -> None:
    name = "blk.1.ffn_norm.weight"
    foreign.write_gguf(tmp_path / "in.gguf", original.config, original.state, leave_out=name)
    result = run(tmp_path / "in.gguf", tmp_path / "out")
    assert result.exit_code == 2
    assert f"lacks tensors: {name}" in result.stderr


def test_an_embedding_of_gguf_that_is_no_matrix_is_refused(
    original: Original, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    state = original.state | {name: original.state[name][0]}
    foreign.write_gguf(tmp_path / "in.gguf", original.config, state)
    result = run(tmp_path / "in.gguf", tmp_path / "out")
    assert result.exit_code == 2
    assert "lacks a matrix token_embd.weight" in result.stderr


def test_another_architecture_of_gguf_is_refused(original: Original, tmp_path: Path) -> None:
    foreign.write_gguf(
        tmp_path / "in.gguf", original.config, original.state, architecture="qwen2moe"
    )
    result = run(tmp_path / "in.gguf", tmp_path / "out")
    assert result.exit_code == 2
    assert "has the architecture 'qwen2moe'; known: llama" in result.stderr


def test_unexpected_tensors_are_named(original: Original, tmp_path: Path, tensors: State) -> None:
    tensors["layers.0.adapter.weight"] = torch.ones(2, 2)
    said = refused(original, tmp_path, tensors)
    assert "has unexpected tensors: layers.0.adapter.weight" in said


def test_tensors_under_two_names_are_named(
    original: Original, tmp_path: Path, tensors: State
) -> None:
    other = "layers.0.block_sparse_moe.gate.weight"
    tensors[other] = tensors["layers.0.feed_forward.gate.weight"].clone()
    said = refused(original, tmp_path, tensors)
    assert f"{other} and layers.0.feed_forward.gate.weight, which are the same tensor" in said


def test_tensors_in_two_files_are_named(original: Original, tmp_path: Path, tensors: State) -> None:
    foreign.write_mistral(tmp_path / "in", original.config, tensors)
    save_file(
        {"norm.weight": tensors["norm.weight"]}, tmp_path / "in" / "consolidated.01.safetensors"
    )
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert "tensor norm.weight is also in" in result.stderr


def test_wrong_shapes_are_named(original: Original, tmp_path: Path, tensors: State) -> None:
    tensors["norm.weight"] = torch.ones(63)
    said = refused(original, tmp_path, tensors)
    assert "tensor norm.weight has shape [63]; params.json says [64]" in said


def test_values_beyond_float16_are_refused(original: Original, tmp_path: Path) -> None:
    source = shutil.copytree(original.folder, tmp_path / "in")
    state = dict(original.state)
    state["model.norm.weight"] = state["model.norm.weight"] * 1e6
    save_file(state, source / "model.safetensors")
    result = run(source, tmp_path / "out", "--dtype", "float16")
    assert result.exit_code == 2
    assert "model.norm.weight has values too large for float16" in result.stderr
    assert not (tmp_path / "out").exists()
