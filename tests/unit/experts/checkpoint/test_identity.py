"""Identities: of weights, of text, and what hashing anew finds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from experts.checkpoint import hash_cache, identity
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.hash_cache import BESIDE, keep, read_kept
from experts.checkpoint.identity import identity_of, text_identity, verify_hashes
from experts.checkpoint.remote.remote_files import open_model
from tests.checkpoints import copy_of
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor
from tests.unit.experts.checkpoint.remote.test_remote_files import HERE, FakeNeighbours

NORM = "model.norm.weight"


TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def test_all_that_makes_text_of_tokens_and_nothing_else_counts_for_the_texts_identity(
    folder: Path, tmp_path: Path
) -> None:
    def text_of(folder: Path) -> str:
        return text_identity(open_checkpoint(folder))

    first = text_of(folder)
    seen = {first}
    for name in (*TEXT, "vocab.txt", "tokenizer.model", "special_tokens_map.json"):
        file = folder / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes((before or b"{}") + b" ")
        seen.add(text_of(folder))
        file.unlink()
        if before is not None:
            seen.add(text_of(folder))
            file.write_bytes(before)
    one, other = folder / TEXT[0], folder / TEXT[1]
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    seen.add(text_of(folder))
    assert len(seen) == 1 + 2 * len(TEXT) + 3 + 1
    assert all(len(one) == 32 for one in seen)
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])

    flip_in_tensor(folder, NORM)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace("1e-05", "2e-05"))
    for name in ("training.json", "README.md", "model.safetensors.index.json.bak"):
        (folder / name).write_text("{}")
    assert text_of(copy_of(folder, tmp_path / "copy")) == first


def test_both_identities_are_the_same_from_another_node(folder: Path) -> None:
    here = open_checkpoint(folder)
    there = open_model(HERE, identity_of(here), FakeNeighbours({"a": folder}))
    assert there.remote is not None
    assert (identity_of(there), text_identity(there)) == (identity_of(here), text_identity(here))


def test_hashing_much_is_said_in_a_line_and_only_when_it_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertmesh.hashes")
    monkeypatch.setattr(identity, "LOGGED_BYTES", 1_000_000)
    seen: list[int] = []
    for _ in range(2):
        identity_of(open_checkpoint(folder), lambda done, all_bytes: seen.append(done))
    assert caplog.messages == [f"hashing model, 0.0 GB: once; kept in {folder / BESIDE}"]
    assert seen[-1] == open_checkpoint(folder).num_bytes


# Hashing anew.


def test_hashing_anew_tells_what_became_of_the_kept_hashes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> str:
        return verify_hashes(open_checkpoint(folder)).kept

    assert told() == "none"
    first = identity_of(open_checkpoint(folder))
    done = verify_hashes(open_checkpoint(folder))
    assert (done.identity, done.kept, done.file) == (first, "equal", folder / BESIDE)
    assert (done.folder, done.num_bytes) == (folder, open_checkpoint(folder).num_bytes)
    (folder / "model.safetensors").touch()  # only looks changed
    done = verify_hashes(open_checkpoint(folder))
    assert (done.kept, done.identity) == ("equal", first)
    assert read_kept(open_checkpoint(folder)).is_current
    flip_in_tensor(folder, NORM)
    done = verify_hashes(open_checkpoint(folder))
    assert done.kept == "outdated"
    assert done.identity != first
    assert told() == "equal"
    (folder / BESIDE).write_bytes(b"damaged")
    assert told() == "none"
    assert str(folder / BESIDE) in caplog.messages[0]


def test_bytes_that_changed_in_a_file_that_looks_unchanged_are_an_error(folder: Path) -> None:
    """A damaged disk: here the kept hashes are changed, since no test can put a ctime back."""
    checkpoint = open_checkpoint(folder)
    identity_of(checkpoint)
    leaves = dict(read_kept(checkpoint).leaves)
    leaves[NORM] = bytes([leaves[NORM][0] ^ 1]) + leaves[NORM][1:]
    keep(checkpoint, leaves)
    for _ in range(2):  # the kept hashes stay
        with pytest.raises(CheckpointError, match="1 tensors differ from the hashes") as caught:
            verify_hashes(open_checkpoint(folder))
        assert NORM in caught.value.message
        assert str(folder / BESIDE) in caught.value.message
        assert caught.value.field == str(folder / "model.safetensors")
    (folder / BESIDE).unlink()  # as the message says
    assert verify_hashes(open_checkpoint(folder)).kept == "none"


def test_where_nothing_can_be_kept_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "_places", lambda checkpoint: [])
    done = verify_hashes(open_checkpoint(folder))
    assert (done.kept, done.file) == ("none", None)
