"""Kept hashes: bytes are hashed once, and a file of them is believed only when all is right."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import pytest
from blake3 import blake3

from experts.checkpoint import hash_cache, hashes
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.hash_cache import BESIDE, keep, place_of, read_kept
from experts.checkpoint.identity import identity_of
from experts.checkpoint.stored import resolve_folder
from tests.checkpoints import copy_of, save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor, replace

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for what cannot be kept beside a checkpoint."""
    path = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_bytes_are_hashed_once(folder: Path, hashed: list[Path], cache: Path) -> None:
    before = set(files_in(folder))
    identities = {identity_of(open_checkpoint(folder)) for _ in range(3)}
    assert (len(identities), hashed) == (1, [folder])
    assert set(files_in(folder)) - before == {folder / BESIDE}
    assert not cache.exists()


def test_a_bundled_model_is_hashed_once_and_its_folder_stays_as_it_is(
    hashed: list[Path], cache: Path
) -> None:
    bundled = resolve_folder("models/mesh-tiny")
    before = {file: file.stat().st_mtime_ns for file in files_in(bundled)}
    checkpoint = open_checkpoint(bundled)
    assert place_of(checkpoint).is_relative_to(cache)
    assert identity_of(checkpoint) == identity_of(open_checkpoint(bundled))
    assert hashed == [bundled]
    assert {file: file.stat().st_mtime_ns for file in files_in(bundled)} == before
    assert files_in(cache) == [place_of(checkpoint)]


def block(place: Path) -> None:
    """Let nobody write a file, not even root, who may write in any folder."""
    place.mkdir()
    (place / "full").touch()


def test_where_the_folder_cannot_be_written_the_cache_keeps_them(
    folder: Path, tmp_path: Path, hashed: list[Path], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(folder / BESIDE)
    first = identity_of(open_checkpoint(folder))
    assert identity_of(open_checkpoint(folder)) == first
    assert hashed == [folder]
    assert len(files_in(cache)) == 1
    assert not list(folder.glob("*.part"))
    other = copy_of(folder, tmp_path / "copy")
    block(other / BESIDE)
    identity_of(open_checkpoint(other))
    assert len(files_in(cache)) == 2
    assert caplog.messages == []
    shutil.rmtree(folder / BESIDE)
    (folder / BESIDE).write_bytes(b"damaged")  # it does not hide the good one
    assert identity_of(open_checkpoint(folder)) == first
    assert hashed == [folder, other]


def test_where_nothing_can_be_written_a_warning_says_so(
    folder: Path, hashed: list[Path], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block(folder / BESIDE)
    cache.touch()
    first = identity_of(open_checkpoint(folder))
    assert identity_of(open_checkpoint(folder)) == first
    assert hashed == [folder, folder]
    for words in (str(folder / BESIDE), str(cache), "XDG_CACHE_HOME"):
        assert words in caplog.messages[0]


@pytest.mark.parametrize("given", ["", "not/absolute"])
def test_without_an_absolute_cache_home_the_cache_is_in_the_users_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    block(folder / BESIDE)
    identity_of(open_checkpoint(folder))
    [file] = files_in(tmp_path / "home")
    assert file.parent == tmp_path / "home" / ".cache" / "expertmesh" / "hashes"


# When kept hashes are outdated.


def replace_by_a_copy(folder: Path) -> None:
    file = folder / WEIGHTS
    stat = file.stat()
    replace(file, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def add_to_the_end(folder: Path) -> None:
    # Without a change of the header the file is not whole, so it is written anew, longer.
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length] + b" " * 8
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length + 8) + header + data[8 + length :])


def move(folder: Path) -> None:
    moved = folder.rename(folder.with_name("moved"))
    folder.symlink_to(moved)


CHANGES = {
    "touched": lambda folder: os.utime(folder / WEIGHTS),
    "flipped": lambda folder: flip_in_tensor(folder, NORM),
    "replaced by a copy": replace_by_a_copy,
    "longer": add_to_the_end,
    "moved": move,
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_file_makes_its_hashes_outdated(
    folder: Path, hashed: list[Path], change: str
) -> None:
    first = identity_of(open_checkpoint(folder))
    CHANGES[change](folder)
    assert not read_kept(open_checkpoint(folder)).is_current
    assert (identity_of(open_checkpoint(folder)) == first) == (change != "flipped")
    assert len(hashed) == 2
    assert read_kept(open_checkpoint(folder)).is_current


def test_links_configuration_and_tokenizer_need_no_new_hashes(
    folder: Path, hashed: list[Path]
) -> None:
    first = identity_of(open_checkpoint(folder))
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert identity_of(open_checkpoint(link)) == first
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-05", "2e-05"))
    (folder / "tokenizer.json").touch()
    assert identity_of(open_checkpoint(folder)) != first  # the root is computed each time
    assert hashed == [folder]


def test_hashes_of_other_tensors_are_none(folder: Path, tmp_path: Path) -> None:
    identity_of(open_checkpoint(folder))
    save_mixtral(tmp_path / "other", num_hidden_layers=4)
    shutil.copy(folder / BESIDE, tmp_path / "other" / BESIDE)
    assert read_kept(open_checkpoint(tmp_path / "other")) is None


# Files of kept hashes that are not believed.


MAGIC = b"expertmesh hashes\n"


def checked(content: bytes) -> bytes:
    """Return a file whose checksum is right."""
    return content + blake3(content).digest()


def framed(header: bytes, leaves: bytes = b"", version: int = hash_cache.VERSION) -> bytes:
    """Return a file whose lengths are right, too."""
    return checked(MAGIC + struct.pack("<II", version, len(header)) + header + leaves)


def header(**changes: object) -> bytes:
    values = {"folder": b"/x", "files": {}, "leaf_bytes": hashes.LEAF_BYTES, "tensors": {}}
    return msgpack.packb({**values, **changes})


BAD_FILES = {
    "empty": b"",
    "another kind of file": b"{}" * 1000,
    "a header longer than the file": checked(
        MAGIC + struct.pack("<II", hash_cache.VERSION, 1 << 31)
    ),
    "no msgpack": framed(b"\xc1"),
    "not a mapping": framed(msgpack.packb([1, 2])),
    "a missing key": framed(msgpack.packb({"folder": b"/x"})),
    "an unknown key": framed(header(more=1)),
    "a folder of the wrong type": framed(header(folder="/x")),
    "a number as a name": framed(header(tensors={1: 1})),
    "a negative size": framed(header(tensors={"a": -1})),
    "a size of the wrong type": framed(header(tensors={"a": True})),
    "too few leaves": framed(header(tensors={"a": 1})),
    "a tensor of an exabyte": framed(header(tensors={"a": 1 << 60})),
    "too many leaves": framed(header(), bytes(32)),
    "leaves of another size": framed(header(leaf_bytes=4096)),
    "a header with more after it": framed(header() + b"\x00"),
    "an older version": framed(header(), version=hash_cache.VERSION - 1),
    "a newer version": framed(header(), version=hash_cache.VERSION + 1),
}


@pytest.mark.parametrize("kind", [*BAD_FILES, "larger than"])
def test_a_file_that_is_wrong_is_refused_by_name_and_written_anew(
    folder: Path, hashed: list[Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = identity_of(open_checkpoint(folder))
    good = (folder / BESIDE).read_bytes()
    (folder / BESIDE).write_bytes(BAD_FILES.get(kind, b""))
    if kind == "larger than":
        os.truncate(folder / BESIDE, hash_cache.MAX_FILE_BYTES + 1)  # sparse
    assert identity_of(open_checkpoint(folder)) == first
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(folder / BESIDE) in record.getMessage()
    for words in ("version", "larger than"):
        assert (words in record.getMessage()) == (words in kind), words
    assert len(hashed) == 2
    assert (folder / BESIDE).read_bytes() == good


def test_a_file_with_any_damaged_byte_or_cut_short_anywhere_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "small"
    save_mixtral(folder, num_hidden_layers=1, num_local_experts=2)
    checkpoint = open_checkpoint(folder)
    identity_of(checkpoint)
    file = folder / BESIDE
    good = file.read_bytes()
    ends = (len(good) - hashes.HASH_BYTES - 1, len(good) - 1)  # of the content, and of the file
    for place in (*range(40), *range(40, len(good), 7), *ends):
        flipped = good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :]
        for bad in (flipped, good[:place]):
            file.write_bytes(bad)
            assert read_kept(checkpoint) is None, place
    file.write_bytes(good + b"x")
    assert read_kept(checkpoint) is None
    assert all(str(file) in message for message in caplog.messages)
    file.write_bytes(good)
    assert read_kept(checkpoint).is_current


def test_many_may_keep_and_read_at_the_same_time(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(folder)
    identity_of(checkpoint)
    leaves = read_kept(checkpoint).leaves

    def write() -> bool:
        return all(keep(checkpoint, leaves) == folder / BESIDE for _ in range(50))

    def read() -> bool:
        return all(read_kept(checkpoint).leaves == leaves for _ in range(200))

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(one) for one in (write, write, write, read, read)]
        assert all(call.result(60) for call in calls)
    assert caplog.messages == []
    assert {file.name for file in folder.iterdir() if file.name.startswith(BESIDE)} == {BESIDE}
