"""Hashing all tensors on several threads: the same as one by one, and of one state of the files."""

from __future__ import annotations

import os
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
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


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


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("when", ["before", "first", "last"])
def test_a_file_that_changes_meanwhile_has_no_hashes(
    checkpoint: Checkpoint, tmp_path: Path, is_replaced: bool, when: str
) -> None:
    file = checkpoint.folder / WEIGHTS
    save_mixtral(tmp_path / "other", seed=1)
    is_changed = threading.Event()

    def change(done_bytes: int, all_bytes: int) -> None:
        if not is_changed.is_set() and (done_bytes == all_bytes or when != "last"):
            is_changed.set()
            if is_replaced:
                replace(file, tmp_path / "other" / WEIGHTS)
            else:
                flip(file, file.stat().st_size - 1)

    if when == "before":
        change(0, 0)
    with pytest.raises(CheckpointError, match=r"changed (while|since) it was (h|o)") as caught:
        hash_tensors(checkpoint, change)
    assert caught.value.field == str(file)


@pytest.mark.parametrize("what", ["missing", "short", "watch"])
def test_an_error_is_named_and_ends_all_threads(checkpoint: Checkpoint, what: str) -> None:
    def fail(done_bytes: int, all_bytes: int) -> None:
        raise RuntimeError("no terminal")

    file = checkpoint.folder / WEIGHTS
    if what == "missing":
        file.unlink()
    elif what == "short":
        os.truncate(file, 100)
    before = threading.active_count()
    with pytest.raises(RuntimeError if what == "watch" else CheckpointError) as caught:
        hash_tensors(checkpoint, fail if what == "watch" else None)
    assert str(file if what != "watch" else "no terminal") in str(caught.value)
    assert threading.active_count() == before
