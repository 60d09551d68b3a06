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
SHARDS = ("--max-shard-size", "100KB")
OTHER, EMBEDDING = "layers.0.block_sparse_moe.gate.weight", "model.embed_tokens.weight"


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
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4}
    save_mixtral(folder, dtype, rope_parameters=rope, rms_norm_eps=1e-3, **sizes)
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


def test_a_source_that_changes_meanwhile_is_refused(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(original.folder, tmp_path / "in")
    real = write.read

    def read(*arguments: Any) -> torch.Tensor:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(write, "read", read)
    assert "changed in the meantime" in refused(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def failed(*words: object) -> str:
    """Return the line with which a machine that cannot do it is told of."""
    result = run(*words)
    assert result.exit_code == 1
    return result.stderr


def test_a_disk_that_takes_no_more_keeps_what_is_whole(
    original: Original, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(100_000)
    said = failed(original.folder, tmp_path / "out")
    small_files(resource.RLIM_INFINITY)
    assert "cannot be written" in said
    assert "run the same command again" in said
    assert not (tmp_path / "out").exists()
    converted(original.folder, tmp_path / "out")
    assert_same_state(state_of(tmp_path / "out"), original.state)


def test_too_little_room_is_said_before_writing(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "are free on its disk" in failed(original.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_where_no_folder_can_be_made_or_another_command_writes(
    original: Original, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said = failed(original.folder, tmp_path / "file" / "out")
    assert "cannot be created: Not a directory" in said
    (tmp_path / ".out.converting").mkdir()
    other = os.open(tmp_path / ".out.converting", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        said = failed(original.folder, tmp_path / "out")
    finally:
        os.close(other)
    assert "another command is using this folder" in said


def test_dest_may_be_empty_but_must_hold_nothing(original: Original, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    converted(original.folder, tmp_path / "empty")
    assert "DEST must be new or empty" in refused(original.folder, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    refused(original.folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    (folder / name).write_bytes(b"never read")
    for source in (folder, folder / name):
        said = refused(source, tmp_path / "out")
        assert name in said
        assert "pickle" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for source, said in (
        ("none", "no such file or folder"),
        ("empty", "is not a known layout"),
        ("text.txt", "is not a known layout"),
        ("cut.gguf", "is not a complete GGUF file"),
    ):
        [line] = refused(tmp_path / source, tmp_path / "out").strip().splitlines()
        assert said in line


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda state: state.pop("layers.1.attention.wq.weight"),
            "lacks tensors: layers.1.attention.wq.weight",
        ),
        (
            lambda state: state.update({"layers.0.adapter.weight": torch.ones(2, 2)}),
            "has unexpected tensors: layers.0.adapter.weight",
        ),
        (
            lambda state: state.update({OTHER: state["layers.0.feed_forward.gate.weight"].clone()}),
            f"{OTHER} and layers.0.feed_forward.gate.weight, which are the same tensor",
        ),
        (
            lambda state: state.update({"norm.weight": torch.ones(63)}),
            "tensor norm.weight has shape [63]; params.json says [64]",
        ),
    ],
    ids=["missing", "unexpected", "two names", "shape"],
)
def test_wrong_tensors_are_named(
    original: Original, tmp_path: Path, tensors: State, edit: Callable[[State], object], said: str
) -> None:
    edit(tensors)
    foreign.write_mistral(tmp_path / "in", original.config, tensors, 1)
    assert said in refused(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def refused(*words: object) -> str:
    """Return the line with which bad input is refused."""
    result = run(*words)
    assert result.exit_code == 2
    return result.stderr


OTHER = "layers.0.block_sparse_moe.gate.weight"


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leave_out": "blk.1.ffn_norm.weight"}, "lacks tensors: blk.1.ffn_norm.weight"),
        ({"architecture": "qwen2moe"}, "has the architecture 'qwen2moe'; known: llama"),
        ({}, "lacks a matrix token_embd.weight"),
    ],
    ids=["missing", "architecture", "embedding of one row"],
)
def test_wrong_gguf_is_refused(
    original: Original, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    state = (
        original.state if options else original.state | {EMBEDDING: original.state[EMBEDDING][0]}
    )
    foreign.write_gguf(tmp_path / "in.gguf", original.config, state, **options)
    assert said in refused(tmp_path / "in.gguf", tmp_path / "out")


@pytest.fixture
def tensors(original: Original) -> State:
    return foreign.mistral_tensors(original.config, original.state, "feed_forward", stacked=False)


def test_tensors_in_two_files_are_named(original: Original, tmp_path: Path, tensors: State) -> None:
    foreign.write_mistral(tmp_path / "in", original.config, tensors)
    norm = {"norm.weight": tensors["norm.weight"]}
    save_file(norm, tmp_path / "in" / "consolidated.01.safetensors")
    assert "tensor norm.weight is also in" in refused(tmp_path / "in", tmp_path / "out")


def test_values_beyond_float16_are_refused(original: Original, tmp_path: Path) -> None:
    source = shutil.copytree(original.folder, tmp_path / "in")
    state = original.state | {"model.norm.weight": original.state["model.norm.weight"] * 1e6}
    save_file(state, source / "model.safetensors")
    said = refused(source, tmp_path / "out", "--dtype", "float16")
    assert "model.norm.weight has values too large for float16" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_source", [True, False], ids=["source", "dtype"])
def test_another_source_or_dtype_begins_anew(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_source: bool
) -> None:
    folder = shutil.copytree(original.folder, tmp_path / "in")
    with monkeypatch.context() as patch:
        break_off(patch, after=25)
        run(folder, tmp_path / "out", *SHARDS)
    options = () if is_source else ("--dtype", "bfloat16")
    wanted = {n: t + 1 if is_source else t.bfloat16() for n, t in original.state.items()}
    if is_source:
        save_file(wanted, folder / "model.safetensors")
    assert converted(folder, tmp_path / "out", *SHARDS, *options)["kept_shards"] == 0
    assert_same_state(state_of(tmp_path / "out"), wanted)
