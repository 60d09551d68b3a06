"""Every byte that is read for a model is the one that was deployed, or nothing is served of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError
from experts.bank import GatedFfnExpert
from experts.checkpoint import checkpoint as checkpoint_module
from experts.checkpoint import hashes, identity
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.checkpoint.identity import hash_table_of, identity_of
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.stored import read_range
from router.model.model import load_dense
from tests.arrays import loaded, results
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import save_dbrx, save_gpt_oss
from tests.quantise import CASES, MIXTRAL, make
from tests.unit.experts.checkpoint import changed_files
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor
from tests.unit.experts.local_actor import KEYS, local_actor, rows_of

WEIGHTS = "model.safetensors"
LEAF_BYTES = 1000
FEW = {"num_hidden_layers": 2, "num_local_experts": 4}
SAVED: dict[str, Callable[[Path], Any]] = {
    "mixtral": lambda place: save_mixtral(place, **FEW),
    "dbrx": save_dbrx,
    "gpt_oss": lambda place: save_gpt_oss(place, **FEW),
    "fp8": lambda place: make(MIXTRAL, place, **FEW),
    "mxfp4": lambda place: make(CASES["gpt_oss"], place, **FEW),
}


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LEAF_BYTES", LEAF_BYTES)


@pytest.fixture(params=list(SAVED))
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = SAVED[request.param](tmp_path / "m")
    return getattr(made, "folder", tmp_path / "m")


def served(folder: Path) -> Checkpoint:
    """Open a checkpoint as a process of its deployment does."""
    return open_model(str(folder), identity_of(open_checkpoint(folder)), None)


def load_experts(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Load what the actors load together."""
    shape = checkpoint.shape
    experts = [
        loaded(checkpoint, layer_id, expert_id, "float32")
        for layer_id in shape.layers
        for expert_id in range(shape.num_experts)
    ]
    return [part for e in experts for part in (e.gate_up, e.down)]


def load_all(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Load what a router and its actors load together."""
    dense = load_dense(checkpoint, torch.float32).state_dict()
    return [*dense.values(), *load_experts(checkpoint)]


@pytest.mark.usefixtures("small_leaves")
def test_a_range_has_the_bytes_of_the_file_and_is_refused_for_its_own_leaves_alone(
    folder: Path,
) -> None:
    verified, plain = served(folder), open_checkpoint(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    size = plain.tensors[name].num_bytes
    edges = [0, 1, 999, 1000, 1001, 1999, 2000, 5500, size - 1001, size - 384, size - 1, size]
    for begin, end in itertools.combinations_with_replacement(edges, 2):
        assert read_range(verified, name, begin, end) == read_range(plain, name, begin, end)
    flip_in_tensor(folder, name, 3500)
    for begin, end in ((0, 3000), (4000, 9000), (2999, 3000)):
        read_range(verified, name, begin, end)
    for begin, end in ((3999, 4000), (0, 3001), (3000, 4000), (2500, 4500), (0, 16384)):
        with pytest.raises(CheckpointError, match="bytes 3000 to 4000 differ") as caught:
            read_range(verified, name, begin, end)
        assert name in caught.value.message
        assert caught.value.field == str(folder / WEIGHTS)


@pytest.mark.usefixtures("small_leaves")
def test_a_model_is_loaded_with_the_same_bits_though_its_file_looks_changed(
    any_folder: Path,
) -> None:
    right, checkpoint = load_all(open_checkpoint(any_folder)), served(any_folder)
    changed_files.replace(any_folder / WEIGHTS, any_folder / WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(load_all(checkpoint), right, strict=True))


def test_no_changed_byte_of_any_tensor_is_loaded(any_folder: Path) -> None:
    checkpoint = served(any_folder)
    for name in checkpoint.tensors:
        middle = checkpoint.tensors[name].num_bytes // 2
        file = any_folder / checkpoint.tensors[name].file
        changed_files.flip(file, checkpoint.tensors[name].begin + middle)
        load = load_experts if ".experts." in name else partial(load_dense, dtype=torch.float32)
        with pytest.raises(CheckpointError, match="differ from the checkpoint") as caught:
            load(checkpoint)
        assert name in caught.value.message
        assert caught.value.field == str(file)
        changed_files.flip(file, checkpoint.tensors[name].begin + middle)
    load_all(checkpoint)


def test_on_a_warm_start_only_what_is_loaded_is_hashed_and_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = identity_of(open_checkpoint(folder))
    hashed: list[int] = []
    leaf_hashes = hashes.leaf_hashes

    def counted(data: memoryview) -> bytes:
        hashed.append(len(data))
        return leaf_hashes(data)

    monkeypatch.setattr(hashes, "leaf_hashes", counted)
    assert identity_of(open_checkpoint(folder)) == wanted  # the builder
    checkpoint = open_model(str(folder), wanted, None)
    assert hashed == []
    expert = load_expert(checkpoint, 1, 2, "float32")
    assert sum(hashed) == expert.num_bytes


@pytest.mark.parametrize("cut", ["short", "gone"])
def test_a_file_that_is_short_or_gone_is_named_with_the_tensor(folder: Path, cut: str) -> None:
    checkpoint = served(folder)
    if cut == "gone":
        (folder / WEIGHTS).unlink()
    else:
        os.truncate(folder / WEIGHTS, 5000)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight") as caught:
        read_range(checkpoint, "model.norm.weight", 0, 256)
    assert caught.value.field == str(folder / WEIGHTS)


# What changes between the check and the load.


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same model after more training: no header differs."""
    path = tmp_path / "other"
    save_mixtral(path, seed=1)
    return path


@pytest.mark.parametrize("what", ["weights", "hashed weights", "a folder", "configuration"])
def test_another_checkpoint_is_not_opened(folder: Path, other: Path, what: str) -> None:
    wanted, opened = identity_of(open_checkpoint(folder)), folder
    if what == "a folder":
        opened = other
    elif what == "configuration":
        config = folder / "config.json"
        config.write_text(config.read_text().replace("1e-05", "2e-05"))
    else:
        changed_files.replace(folder / WEIGHTS, other / WEIGHTS)
    if what == "hashed weights":
        assert identity_of(open_checkpoint(folder)) != wanted
    words = r"not the checkpoint being served|differ from the checkpoint"
    with pytest.raises(CheckpointError, match=words):
        open_model(str(opened), wanted, None)


def test_kept_hashes_of_other_bytes_do_not_let_them_in(folder: Path, other: Path) -> None:
    """Whoever can write the file can at most have a checkpoint refused."""
    wanted = identity_of(open_checkpoint(folder))
    forged = hash_table_of(open_checkpoint(other)).leaves
    identity.keep(open_checkpoint(folder), forged)
    with pytest.raises(CheckpointError, match="not the checkpoint being served"):
        open_model(str(folder), wanted, None)
    changed_files.replace(folder / WEIGHTS, other / WEIGHTS)
    identity.keep(open_checkpoint(folder), forged)
    with pytest.raises(CheckpointError, match="not the checkpoint being served"):
        open_model(str(folder), wanted, None)


# What changes while an actor loads.


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_actor_serves_nothing_of_a_file_that_changes_while_it_loads(
    folder: Path, other: Path, is_replaced: bool
) -> None:
    actor = local_actor(folder)  # has loaded some experts
    if is_replaced:
        changed_files.replace(folder / WEIGHTS, other / WEIGHTS)
    else:
        for expert_id in (5, 6):
            name = f"model.layers.1.block_sparse_moe.experts.{expert_id}.w2.weight"
            flip_in_tensor(folder, name, 300, 256)
    keys = [KEYS[0]._replace(layer_id=1, expert_id=expert_id) for expert_id in (5, 6)]
    for _ in range(2):  # again, as the controller tries
        with pytest.raises(CheckpointError, match="differ from the checkpoint") as caught:
            actor.load(1, actor._spec, keys)
        assert str(folder) in caught.value.field
        assert set(actor.heartbeat(1).experts) == set(KEYS)
    # The right bytes come back, in other files.
    (folder / WEIGHTS).unlink()
    save_mixtral(folder.with_name("again")).save_pretrained(folder, max_shard_size="50KB")
    assert set(actor.load(1, actor._spec, keys).experts) == {*KEYS, *keys}
    weights = load_expert(open_checkpoint(folder), 1, 5, "float32")
    ours, right = actor._bank.experts[keys[0]], GatedFfnExpert(weights, "silu", 1)
    assert torch.equal(results(ours, rows_of(4)), results(right, rows_of(4)))


def test_without_a_table_a_changed_file_is_refused_by_its_stamp(folder: Path) -> None:
    checkpoint = replace(served(folder), hashes=None)
    flip_in_tensor(folder, "model.norm.weight")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        read_range(checkpoint, "model.embed_tokens.weight", 0, 4)


def test_a_file_that_changes_while_it_is_opened_is_refused(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_headers = checkpoint_module.read_headers

    def changed(*arguments: Any) -> Any:
        headers = read_headers(*arguments)
        changed_files.replace(folder / WEIGHTS, other / WEIGHTS)
        return headers

    monkeypatch.setattr(checkpoint_module, "read_headers", changed)
    with pytest.raises(CheckpointError, match="has changed while it was opened") as caught:
        open_checkpoint(folder)
    assert caught.value.field == str(folder / WEIGHTS)
