"""A mixture's folder: opening, identity, kept hashes, and reading it from another node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import CheckpointError, CheckpointMissingError
from experts.backends.load import load_mixture_expert
from experts.checkpoint import hashes, mixture
from experts.checkpoint.folder import language_model, open_folder
from experts.checkpoint.hash_cache import BESIDE
from experts.checkpoint.identity import hash_table_of, identity_of, text_identity, verify_hashes
from experts.checkpoint.mixture import Mixture, files_of, open_mixture
from experts.checkpoint.remote import remote_files
from experts.checkpoint.remote.remote_files import open_model
from tests.checkpoints import copy_of, save_mixtral
from tests.unit.experts.backends.folders import linear_files, predicted, save_mixture
from tests.unit.experts.checkpoint.changed_files import flip
from tests.unit.experts.checkpoint.remote.test_remote_files import HERE, FakeNeighbours, damaged
from tests.unit.experts.mixture.documents import FILES, document

Document = dict[str, Any]


def save(folder: Path, content: Document | None = None) -> Path:
    """Write the document and its files, each of other bytes."""
    content = document() if content is None else content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for number, name in enumerate(FILES):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes([number]) * (3000 + number))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "mixture")


def test_a_mixture_is_its_files_as_bytes(folder: Path) -> None:
    (folder / "b.skops").rename(folder.parent / "blob")
    (folder / "b.skops").symlink_to(folder.parent / "blob")  # as in the cache of a hub
    opened = open_folder(folder)
    assert isinstance(opened, Mixture)
    assert tuple(opened.tensors) == files_of(opened.spec) == FILES
    assert opened.num_bytes == sum((folder / name).stat().st_size for name in FILES)
    for name in FILES:
        assert opened.file(name) == (folder / name).read_bytes()
    with pytest.raises(CheckpointError, match="is a mixture, not a language model"):
        language_model(opened)


@pytest.mark.parametrize("change", ["removed", "empty", "a folder"])
@pytest.mark.parametrize("name", ["b.skops", "data/c.bin", "gates.safetensors"])
def test_files_that_are_not_there_are_named(folder: Path, name: str, change: str) -> None:
    (folder / name).unlink()
    if change == "empty":
        (folder / name).touch()
    elif change == "a folder":
        (folder / name).mkdir()
    words = "the file is empty" if change == "empty" else "mixture.yaml names a missing file"
    with pytest.raises(CheckpointError, match=words) as caught:
        open_mixture(folder)
    assert caught.value.field == str(folder / name)


def test_a_mixture_yaml_that_is_wrong_or_too_long_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = save(tmp_path / "m", document("experts.b.method", "transform"))
    with pytest.raises(CheckpointError) as caught:
        open_mixture(wrong)
    assert caught.value.field == f"{wrong / 'mixture.yaml'}: experts.b.method"
    size = (folder / "mixture.yaml").stat().st_size
    monkeypatch.setattr(mixture, "MAX_SPEC_BYTES", size)
    open_mixture(folder)
    monkeypatch.setattr(mixture, "MAX_SPEC_BYTES", size - 1)
    with pytest.raises(CheckpointError, match=f"has more than {size - 1} bytes") as caught:
        open_mixture(folder)
    assert caught.value.field == str(folder / "mixture.yaml")


# Identity.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("offset", [0, 1500, -1])
def test_every_byte_of_every_file_is_in_the_identity(folder: Path, name: str, offset: int) -> None:
    before = identity_of(open_mixture(folder))
    size = (folder / name).stat().st_size
    flip(folder / name, offset % size)
    assert identity_of(open_mixture(folder)) != before
    flip(folder / name, offset % size)
    assert identity_of(open_mixture(folder)) == before
    with (folder / name).open("ab") as opened:
        opened.write(b"\0")
    assert identity_of(open_mixture(folder)) != before


def with_swapped(key: str, first: str, second: str) -> Document:
    """Return the document in which two entries of a mapping have changed places."""
    content = document()
    order = list(content[key])
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    content[key] = {name: content[key][name] for name in order}
    return content


VALUES: dict[str, Any] = {
    "description": "other",
    "dtype": "float64",
    "inputs.0.name": "z",
    "inputs.0.datatype": "UINT8",
    "inputs.0.shape": [2, 2],
    "rows": "x",
    "gates.root.top_k": 2,
    "gates.root.renormalize": False,
    "gates.root.prefix": "root.",
    "gates.root.choices": ["right", "left"],
    "gates.left.activation": "silu",
    "gates.right.column": 0,
    "experts.a.link": "sigmoid",
    "experts.a.prefix": "a.",
    "experts.c.output": "other",
    "experts.c.data": ["data/c.bin", "b.skops"],
    "combine.kind": "vote",
    "combine.classes": ["yes", "no"],
    "outputs.0.name": "class",
    "outputs.1.datatype": "FP64",
    "outputs.2.from": "label",
}


def other_document(path: str) -> Document:
    """Return a document that differs in the value at a path, or in the order of its experts."""
    if path == "experts":
        return with_swapped("experts", "a", "b")
    content = document(path, VALUES[path])
    if path == "combine.kind":
        content["outputs"][1]["from"] = "votes"
    if path == "outputs.2.from":
        content["outputs"][2]["datatype"] = "BYTES"
    return content


@pytest.mark.parametrize("path", [*VALUES, "experts", "experts.b.file"])
def test_every_value_of_mixture_yaml_is_in_the_identity(folder: Path, path: str) -> None:
    """The order of experts, too: it numbers them."""
    before, text = identity_of(open_mixture(folder)), text_identity(open_mixture(folder))
    if path == "experts.b.file":
        (folder / "b.skops").rename(folder / "other.skops")
        content = document(path, "other.skops")
        (folder / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    else:
        save(folder, other_document(path))
    after = open_mixture(folder)
    assert identity_of(after) != before
    assert text_identity(after) == text  # it has no text files


def test_the_order_of_gates_the_form_of_the_text_and_other_files_are_not(folder: Path) -> None:
    before = identity_of(open_mixture(folder))
    save(folder, with_swapped("gates", "left", "right"))
    text = (folder / "mixture.yaml").read_text()
    (folder / "mixture.yaml").write_text(f"# a comment\n{text}")
    (folder / "README.md").write_text("a card")
    assert identity_of(open_mixture(folder)) == before


# Kept hashes.


def test_files_are_hashed_once_whatever_becomes_of_mixture_yaml(
    folder: Path, hashed: list[Path]
) -> None:
    identities = {identity_of(open_mixture(folder)) for _ in range(3)}
    content = document("combine.classes", ["yes", "no"])
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    identities.add(identity_of(open_mixture(folder)))
    assert (len(identities), hashed) == (2, [folder])
    assert (folder / BESIDE).is_file()
    flip(folder / "c.onnx", 7)
    assert identity_of(open_mixture(folder)) not in identities
    assert hashed == [folder] * 2


def test_bytes_that_changed_unseen_are_noticed(folder: Path) -> None:
    opened = open_mixture(folder)
    verified = replace(opened, hashes=hash_table_of(opened))
    assert verify_hashes(opened).kept == "equal"
    flip(folder / "b.skops", 5)
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        opened.file("b.skops")
    with pytest.raises(CheckpointError, match="differ from the checkpoint that is served"):
        verified.file("b.skops")
    assert opened.file("c.onnx") == verified.file("c.onnx") == (folder / "c.onnx").read_bytes()


# Other nodes.


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LEAF_BYTES", 1024)
    monkeypatch.setattr(remote_files, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(remote_files, "PEERS_AT_ONCE", 1)
    monkeypatch.setattr(remote_files.random, "shuffle", lambda nodes: nodes.sort())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_mixture_opens_from_another_node_without_damaged_bytes(
    folder: Path, caplog: pytest.LogCaptureFixture, is_damaged: bool
) -> None:
    here = open_mixture(folder)
    faults = {"a": damaged} if is_damaged else {}
    there = open_model(HERE, identity_of(here), FakeNeighbours({"a": folder, "b": folder}, faults))
    assert isinstance(there, Mixture)
    assert (there.spec, identity_of(there)) == (here.spec, identity_of(here))
    for name in FILES:
        assert there.file(name) == (folder / name).read_bytes()
    assert there.small_file("mixture.yaml") == (folder / "mixture.yaml").read_bytes()
    assert ["sent wrong bytes" in message for message in caplog.messages] == [True] * is_damaged


@pytest.mark.usefixtures("small_chunks")
def test_an_expert_loads_from_another_node_and_only_its_files_travel(tmp_path: Path) -> None:
    content, files = linear_files(["a", "b"])
    opened = save_mixture(tmp_path / "m", content, files)
    neighbours = FakeNeighbours({"a": opened.folder})
    there = open_model(HERE, identity_of(opened), neighbours)
    assert isinstance(there, Mixture)
    ours, right = load_mixture_expert(there, 1), load_mixture_expert(opened, 1)
    rows = predicted(right, [[1.0, 2.0, 3.0]])
    assert (predicted(ours, [[1.0, 2.0, 3.0]]) == rows).all()
    assert {name for name, _, _ in neighbours.reads["a"]} == {"b.safetensors"}


@pytest.mark.parametrize(
    "path", ["combine.classes", "experts.a.link", "dtype", "experts", "a checkpoint"]
)
def test_another_mixture_at_a_node_is_passed_by(folder: Path, tmp_path: Path, path: str) -> None:
    if path == "a checkpoint":
        save_mixtral(tmp_path / "other")
    else:
        save(tmp_path / "other", other_document(path))
    neighbours = FakeNeighbours({"a": tmp_path / "other"})
    with pytest.raises(CheckpointMissingError, match="is not the checkpoint being served"):
        open_model(HERE, identity_of(open_mixture(folder)), neighbours)


def test_a_mixture_on_this_node_is_used_where_it_is_the_served_one(
    folder: Path, tmp_path: Path
) -> None:
    served = identity_of(open_mixture(folder))
    copy = copy_of(folder, tmp_path / "copy")
    neighbours = FakeNeighbours({"a": folder})
    opened = open_model(str(copy), served, neighbours)
    assert opened.remote is None
    assert opened.file("c.onnx") == (folder / "c.onnx").read_bytes()
    save(copy, document("combine.classes", ["yes", "no"]))
    assert open_model(str(copy), served, neighbours).remote is not None
