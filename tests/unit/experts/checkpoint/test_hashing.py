"""Hashing all tensors on several threads: the same as one by one, and of one state of the files."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import pytest
from blake3 import blake3

from cluster.errors import CheckpointError
from experts.checkpoint import hashes, hashing
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.hashing import hash_tensors
from experts.checkpoint.stored import read_range
from tests.checkpoints import save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip, replace

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_mixtral(tmp_path)
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize("leaf_bytes", [512, 1000, 1 << 20])
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_together_do_what_one_does(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, leaf_bytes: int, num_threads: int
) -> None:
    monkeypatch.setattr(hashes, "LEAF_BYTES", leaf_bytes)
    monkeypatch.setattr(hashing, "MIN_THREADS", num_threads)
    monkeypatch.setattr(hashing, "MAX_THREADS", num_threads)
    seen: list[tuple[int, int]] = []
    leaves = hash_tensors(checkpoint, lambda done, all_bytes: seen.append((done, all_bytes)))
    for name, info in checkpoint.tensors.items():
        data = read_range(checkpoint, name, 0, info.num_bytes)
        parts = [data[i : i + leaf_bytes] for i in range(0, len(data), leaf_bytes)]
        assert leaves[name] == b"".join(blake3(part).digest() for part in parts), name
    assert leaves.keys() == checkpoint.tensors.keys()
    assert seen == sorted(seen)
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)


def test_little_is_in_memory_beside_the_leaves(tmp_path: Path) -> None:
    save_mixtral(tmp_path, hidden_size=256, intermediate_size=1024)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_bytes > 70_000_000
    hash_tensors(checkpoint)
    tracemalloc.start()
    try:
        hash_tensors(checkpoint)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < hashing.MAX_THREADS * (3 << 20)


def test_a_file_that_has_changed_since_it_was_opened_is_not_hashed(checkpoint: Checkpoint) -> None:
    flip(checkpoint.folder / WEIGHTS, -1 + (checkpoint.folder / WEIGHTS).stat().st_size)
    with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
        hash_tensors(checkpoint)
    assert caught.value.field == str(checkpoint.folder / WEIGHTS)


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_file_that_changes_meanwhile_has_no_hashes(
    checkpoint: Checkpoint, tmp_path: Path, is_replaced: bool, is_last: bool
) -> None:
    file = checkpoint.folder / WEIGHTS
    other = tmp_path / "other"
    save_mixtral(other, seed=1)
    is_changed = threading.Event()

    def change(done_bytes: int, all_bytes: int) -> None:
        if not is_changed.is_set() and (done_bytes == all_bytes or not is_last):
            is_changed.set()
            if is_replaced:
                replace(file, other / WEIGHTS)
            else:
                flip(file, file.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=r"changed (while|since) it was (hashed|opened)"):
        hash_tensors(checkpoint, change)


@pytest.mark.parametrize("is_missing", [False, True])
def test_an_error_names_the_file_and_ends_all_threads(
    checkpoint: Checkpoint, is_missing: bool
) -> None:
    file = checkpoint.folder / WEIGHTS
    if is_missing:
        file.unlink()
    else:
        with file.open("r+b") as opened:
            opened.truncate(100)
    before = threading.active_count()
    with pytest.raises(CheckpointError) as caught:
        hash_tensors(checkpoint)
    assert caught.value.field == str(file)
    assert threading.active_count() == before


def test_an_error_of_the_watch_is_raised_and_ends_all_threads(checkpoint: Checkpoint) -> None:
    def fail(done_bytes: int, all_bytes: int) -> None:
        raise RuntimeError("no terminal")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no terminal"):
        hash_tensors(checkpoint, fail)
    assert threading.active_count() == before
