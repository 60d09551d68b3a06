"""A checkpoint on another node: only what is needed is fetched, and never anything damaged."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError, CheckpointMissingError
from cluster.spec import ModelExperts, ModelSource
from cluster.wire.tensors import dtype_name
from experts.checkpoint import hashes
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.checkpoint.hash_cache import BESIDE
from experts.checkpoint.identity import hash_table_of, identity_of
from experts.checkpoint.remote import peers, remote_files
from experts.checkpoint.remote import remote_reader as reader_module
from experts.checkpoint.remote.remote_files import Neighbours, open_model
from experts.checkpoint.remote.remote_reader import CheckpointReader, SmallFile
from experts.checkpoint.stored import read_range
from router.gateway.input.tokenizer import Tokenizer, load_models
from router.model.model import load_dense
from router.served import ServedModel, inspect_models
from tests.arrays import loaded
from tests.checkpoints import copy_of, save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor
from tests.unit.router.config.test_config import config_of

LEAF_BYTES, CHUNK_BYTES = 1024, 4096
HERE = "/not/on/this/node"
NORM = "model.norm.weight"
MATRIX = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
NOT_SERVED = "is not the checkpoint being served"
UNNAMED = "sent hashes of tensors that its headers do not name"
Change = Callable[[dict[str, Any]], object]
Fault = Callable[[int, dict[str, Any]], dict[str, Any]]
"""Takes which read it is and its answer; returns another answer, or raises as a peer that fails."""


@dataclass
class FakePeer:
    """The product's own reader in this process, with what a test has it do wrong."""

    node: str
    reader: CheckpointReader
    fault: Fault | None
    reads: list[tuple[str, int, int]]
    hangs: bool = False
    is_mute: bool = False

    def open(self) -> Future[dict[str, Any]]:
        return Future() if self.is_mute else done(self.reader.open)

    def leaves(self, names: Sequence[str]) -> Future[dict[str, Any]]:
        return done(lambda: self.reader.leaves(names))

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        self.reads.append((name, begin, end))
        number = len(self.reads)
        if self.hangs:
            return Future()
        fault = self.fault or (lambda _, answer: answer)
        return done(lambda: fault(number, self.reader.read(name, begin, end)))


def done(call: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    future: Future[dict[str, Any]] = Future()
    try:
        future.set_result(call())
    except OSError as error:  # what the faults below raise
        future.set_exception(error.with_traceback(None))  # Ray's come without one, too
    return future


@dataclass
class FakeNeighbours:
    """Nodes by name, each with the folder that lies under the path there."""

    folders: dict[str, Path | None]
    faults: dict[str, Fault] = field(default_factory=dict)
    hanging: Sequence[str] = ()
    mute: Sequence[str] = ()
    reads: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)

    def nodes(self) -> list[str]:
        return list(self.folders)

    def connect(self, node: str, path: str) -> FakePeer:
        self.connected.append(node)
        reader = CheckpointReader(str(self.folders[node] or path))
        reads = self.reads.setdefault(node, [])
        fault, hangs, is_mute = self.faults.get(node), node in self.hanging, node in self.mute
        return FakePeer(node, reader, fault, reads, hangs, is_mute)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LEAF_BYTES", LEAF_BYTES)
    monkeypatch.setattr(remote_files, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(remote_files, "CHUNK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(remote_files, "PEERS_AT_ONCE", 1)  # in order, so that all is determined
    monkeypatch.setattr(remote_files.random, "shuffle", lambda nodes: nodes.sort())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after more training: no header differs."""
    path = tmp_path_factory.mktemp("other")
    save_mixtral(path, seed=1)
    return path


def fetched(folder: Path, neighbours: Neighbours) -> Checkpoint:
    """Open a checkpoint that is not here, as the deployment asks for it."""
    return open_model(HERE, identity_of(open_checkpoint(folder)), neighbours)


def check_expert(folder: Path, checkpoint: Checkpoint, dtype: str = "float32") -> None:
    """Check that an expert comes bit for bit as from the folder."""
    ours = loaded(checkpoint, 1, 2, dtype)
    right = loaded(open_checkpoint(folder), 1, 2, dtype)
    assert torch.equal(ours.gate_up, right.gate_up)
    assert torch.equal(ours.down, right.down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_is_fetched_whole_and_nothing_else_is(tmp_path: Path, dtype: torch.dtype) -> None:
    save_mixtral(tmp_path, dtype)
    neighbours = FakeNeighbours({"a": None, "b": tmp_path})
    checkpoint = fetched(tmp_path, neighbours)
    assert checkpoint.remote is not None
    assert checkpoint.remote.fetched_bytes == 0
    check_expert(tmp_path, checkpoint, dtype_name(dtype))
    assert checkpoint.remote.fetched_bytes == 3 * 64 * 96 * dtype.itemsize
    parts = checkpoint.family.expert_tensors(checkpoint.config, 1, 2).parts()
    reads = neighbours.reads["b"]
    assert {name for name, _, _ in reads} == {part.name for part in parts}
    assert all(0 < end - begin <= CHUNK_BYTES for _, begin, end in reads)
    assert sum(end - begin for _, begin, end in reads) == checkpoint.remote.fetched_bytes
    assert checkpoint.remote.summary().endswith("from another node")
    checkpoint.remote.release()
    check_expert(tmp_path, checkpoint, dtype_name(dtype))  # a released peer is found again
    assert neighbours.connected == ["a", "b", "a", "b"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_router_gets_the_dense_part_without_any_expert(tmp_path: Path, tied: bool) -> None:
    save_mixtral(tmp_path, tie_word_embeddings=tied)
    neighbours = FakeNeighbours({"a": tmp_path})
    checkpoint = fetched(tmp_path, neighbours)
    ours = load_dense(checkpoint, torch.float32)
    right = load_dense(open_checkpoint(tmp_path), torch.float32)
    assert ours.config.to_dict() | {"_name_or_path": ""} == (
        right.config.to_dict() | {"_name_or_path": ""}
    )
    expected = right.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in ours.state_dict().items())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not any(".experts." in name for name, _, _ in neighbours.reads["a"])


def test_a_gateway_gets_the_tokenizer(folder: Path) -> None:
    identity = identity_of(open_checkpoint(folder))
    source = ModelSource(HERE, "float32", ModelExperts("m", (0, 1, 2), 8, 0), identity)
    model = ServedModel(source, "mixtral", 320, 256, 2, (0,))
    neighbours = FakeNeighbours({"a": folder})
    tokenizer = load_models((model,), neighbours)["m"].tokenizer
    right = Tokenizer.load(str(folder), (0,))
    text = "the quick brown fox, at last: ü"
    assert tokenizer.encode(text) == right.encode(text)
    assert tokenizer.template.prompt([{"role": "user", "content": "x"}]) == "user: x\nassistant:"
    assert neighbours.reads == {"a": []}


def test_a_deployment_is_built_where_the_checkpoint_is_not(folder: Path) -> None:
    config = config_of(folder)
    [right] = inspect_models(config)
    away = config.model_copy(
        update={"models": (config.models[0].model_copy(update={"path": HERE}),)}
    )
    [ours] = inspect_models(away, neighbours=FakeNeighbours({"a": None, "b": folder}))
    assert ours.source.identity == right.source.identity
    assert ours.source.experts == right.source.experts
    assert (ours.dtype, ours.eos_token_ids) == (right.dtype, right.eos_token_ids)


def damaged(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    """Flip a bit of the third chunk."""
    chunk = answer["chunk"]
    return answer if number != 3 else {"chunk": bytes([chunk[0] ^ 1]) + chunk[1:]}


def short(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out the end of the third chunk."""
    return answer if number != 3 else {"chunk": answer["chunk"][:-1]}


def dies(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    """Die at the third chunk."""
    if number >= 3:
        raise ConnectionResetError
    return answer


@pytest.mark.parametrize("fault", [damaged, short, dies, None])
def test_a_fetch_goes_on_at_another_peer_from_the_last_good_chunk(
    folder: Path, fault: Fault | None, caplog: pytest.LogCaptureFixture
) -> None:
    faults, hanging = ({}, ["a"]) if fault is None else ({"a": fault}, [])
    neighbours = FakeNeighbours({"a": folder, "b": folder}, faults, hanging)
    check_expert(folder, fetched(folder, neighbours))
    asked, again = neighbours.reads["a"], neighbours.reads["b"]
    assert again[0] == asked[0 if fault is None else 2]  # what came well is not asked for again
    if fault is damaged:
        assert f"sent wrong bytes 8192 to 9216 of {asked[2][0]}" in caplog.messages[0]


def test_a_node_that_does_not_answer_delays_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "PEERS_AT_ONCE", 8)
    neighbours = FakeNeighbours({"a": folder, "b": folder}, mute=["a"])
    check_expert(folder, fetched(folder, neighbours))  # within the test's own limit
    assert neighbours.connected == ["a", "b"]
    monkeypatch.setattr(peers, "OPEN_TIMEOUT_S", 0.05)
    with pytest.raises(CheckpointMissingError, match="node a: did not answer in time"):
        fetched(folder, FakeNeighbours({"a": folder}, mute=["a"]))


def test_the_only_peer_is_asked_again_and_one_that_fails_for_ever_ends_the_fetch(
    folder: Path,
) -> None:
    neighbours = FakeNeighbours({"a": folder}, {"a": damaged})
    check_expert(folder, fetched(folder, neighbours))
    assert len(neighbours.connected) > 1

    def always(number: int, answer: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionResetError

    neighbours = FakeNeighbours({"a": folder, "b": folder}, {"a": always, "b": always})
    checkpoint = fetched(folder, neighbours)
    with pytest.raises(CheckpointMissingError, match=r"peers failed 5 times.*ConnectionReset"):
        load_expert(checkpoint, 0, 0, "float32")


def test_another_checkpoint_under_the_same_path_is_refused(folder: Path, other: Path) -> None:
    neighbours = FakeNeighbours({"a": other, "b": folder})
    check_expert(folder, fetched(folder, neighbours))
    assert neighbours.reads["a"] == []
    with pytest.raises(CheckpointMissingError) as caught:
        fetched(folder, FakeNeighbours({"a": other, "b": None}))
    for words in ("is not the checkpoint being served", "node a", "node b", "no such folder"):
        assert words in caught.value.message


def test_what_is_here_is_read_here_and_another_checkpoint_passed_by(
    folder: Path, other: Path
) -> None:
    neighbours = FakeNeighbours({"a": folder})
    identity = identity_of(open_checkpoint(folder))
    assert open_model(str(folder), identity, neighbours).remote is None
    assert open_model(str(folder), None, None).remote is None
    assert neighbours.connected == []
    checkpoint = open_model(str(other), identity, neighbours)
    assert checkpoint.remote is not None
    check_expert(folder, checkpoint)
    with pytest.raises(CheckpointMissingError, match=r"\(this node: .*deploy again\); put it"):
        open_model(str(other), identity, FakeNeighbours({}))


def test_a_damaged_checkpoint_here_is_an_error_of_the_builder_and_not_of_an_actor(
    folder: Path, tmp_path: Path
) -> None:
    copy_of(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    neighbours = FakeNeighbours({"a": folder})
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_model(str(tmp_path / "cut"), None, neighbours)
    identity = identity_of(open_checkpoint(folder))
    check_expert(folder, open_model(str(tmp_path / "cut"), identity, neighbours))


def test_no_other_files_are_given_away_and_no_tensor_that_no_header_names(folder: Path) -> None:
    (folder / "secret.pem").write_text("no")
    (folder / "inner").mkdir()
    reader = CheckpointReader(str(folder))
    assert "is not open" in reader.read(NORM, 0, 4)["error"]["message"]
    given = reader.open()["small_files"]
    assert "tokenizer.json" in given
    assert not {"secret.pem", "inner", "model.safetensors"} & set(given)
    for name, begin, end in (
        ("../../etc/passwd", 0, 4),
        ("config.json", 0, 4),
        (NORM, -1, 4),
        (NORM, 0, 1 << 20),
        (NORM, 8, 4),
        (NORM, 0, reader_module.MAX_CHUNK_BYTES + 1),
    ):
        assert set(reader.read(name, begin, end)) == {"error"}, (name, begin, end)


@pytest.mark.parametrize("reads_fail", [False, True])
def test_peers_are_gone_with_the_last_use_of_them_though_others_died(
    folder: Path,
    reads_fail: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "expertmesh.peers")  # or what is logged would be kept
    monkeypatch.setattr(remote_files, "PEERS_AT_ONCE", 2)
    neighbours = FakeNeighbours({"a": None, "b": None, "c": folder, "d": folder})
    if reads_fail:
        neighbours.faults = {"c": dies, "d": dies}
    connected: list[weakref.ref[FakePeer]] = []
    connect_to = neighbours.connect

    def died() -> dict[str, Any]:
        raise OSError("the node is gone")

    def connect(node: str, path: str) -> FakePeer:
        peer = connect_to(node, path)
        peer.reads = []  # so that each new peer fails anew
        if node == "a":  # dies before it has opened anything
            peer.reader.open = died  # type: ignore[method-assign]
        connected.append(weakref.ref(peer))
        return peer

    monkeypatch.setattr(neighbours, "connect", connect)
    gc.collect()
    gc.disable()  # it comes late or, in a quiet process, never: a peer's process would stay
    try:
        checkpoint = fetched(folder, neighbours)
        assert checkpoint.remote is not None
        check_expert(folder, checkpoint)
        checkpoint.remote.release()
        assert len(connected) >= 4
        assert [peer().node for peer in connected if peer() is not None] == []
    finally:
        gc.enable()


# What a peer's bytes are verified against.


def altered(neighbours: FakeNeighbours, node: str, call: str, change: Change) -> FakeNeighbours:
    """Let the reader of a node change the answers of one of its calls."""
    connect = neighbours.connect

    def connected(to: str, path: str) -> FakePeer:
        peer = connect(to, path)
        if to == node:
            honest = getattr(peer.reader, call)

            def lie(*arguments: Any) -> dict[str, Any]:
                answer = honest(*arguments)
                change(answer)
                return answer

            setattr(peer.reader, call, lie)
        return peer

    neighbours.connect = connected  # type: ignore[method-assign]
    return neighbours


def hashes_shifted(answer: dict[str, Any]) -> None:
    """Move a byte from a hash to the next one, so that all together are the same bytes."""
    first, second = sorted(answer["hashes"])[:2]
    both = answer["hashes"][first] + answer["hashes"][second]
    answer["hashes"] |= {first: both[:31], second: both[31:]}


def small_file(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Return a change of a small file, whose hash is right."""

    def changed(answer: dict[str, Any]) -> None:
        old = answer["small_files"].get(name, SmallFile.of(b""))
        answer["small_files"][name] = SmallFile.of(change(old.data))

    return changed


def other_dtype(answer: dict[str, Any]) -> None:
    file, shape, _, begin, end = answer["tensors"][NORM]
    answer["tensors"][NORM] = (file, (shape[0] * 2,), "BF16", begin, end)


def petabyte(answer: dict[str, Any]) -> None:
    file, shape, dtype, begin, _ = answer["tensors"][NORM]
    answer["tensors"][NORM] = (file, shape, dtype, begin, begin + (1 << 50))


def small_file_damaged(answer: dict[str, Any]) -> None:
    good = answer["small_files"]["tokenizer.json"]
    answer["small_files"]["tokenizer.json"] = SmallFile(good.data + b" ", good.hash)


WRONG_TABLES: dict[str, tuple[Change, str]] = {
    "other hash": (lambda answer: answer["hashes"].update({NORM: bytes(32)}), NOT_SERVED),
    "hash missing": (lambda answer: answer["hashes"].pop(NORM), UNNAMED),
    "hashes shifted": (hashes_shifted, UNNAMED),
    "other config": (
        small_file("config.json", lambda old: old.replace(b"1e-05", b"2e-05")), NOT_SERVED
    ),
    "broken config": (small_file("config.json", lambda _: b"{"), "is not JSON"),
    "other dtype": (other_dtype, "has shape"),
    "a petabyte": (petabyte, "do not match its shape"),
    "damaged small file": (small_file_damaged, "tokenizer.json arrived corrupt"),
    "file elsewhere": (small_file("../../evil.json", lambda _: b"{}"), "is not a plain file name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_TABLES)
def test_a_peer_whose_table_is_not_that_of_the_served_checkpoint_is_passed_over(
    folder: Path, kind: str
) -> None:
    change, words = WRONG_TABLES[kind]
    neighbours = altered(FakeNeighbours({"a": folder, "b": folder}), "a", "open", change)
    check_expert(folder, fetched(folder, neighbours))
    assert neighbours.reads["a"] == []
    with pytest.raises(CheckpointMissingError, match=words):
        fetched(folder, altered(FakeNeighbours({"a": folder}), "a", "open", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda all_leaves: [bytes([leaves[0] ^ 1]) + leaves[1:] for leaves in all_leaves],
        lambda all_leaves: [leaves[:-32] for leaves in all_leaves],
        lambda all_leaves: [],
    ],
    ids=["changed", "missing", "none"],
)
def test_a_peer_that_sends_wrong_leaves_is_left_before_its_bytes_are_taken(
    folder: Path, change: Callable[[list[bytes]], list[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    def lie(answer: dict[str, Any]) -> None:
        answer["leaves"] = change(answer["leaves"])

    neighbours = altered(FakeNeighbours({"a": folder, "b": folder}), "a", "leaves", lie)
    check_expert(folder, fetched(folder, neighbours))
    for words in ("node a", "sent", "hashes of"):
        assert words in caplog.messages[0]
    assert len({name for name, _, _ in neighbours.reads["b"]}) == 3  # all matrices


def test_bytes_that_changed_on_the_peers_disk_are_not_taken(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reader's table is right, and was right for its file: the bytes have changed since."""
    bad = copy_of(folder, tmp_path / "bad")
    identity_of(open_checkpoint(bad))
    neighbours = FakeNeighbours({"a": bad, "b": folder})
    checkpoint = fetched(folder, neighbours)
    flip_in_tensor(bad, MATRIX, 9000)
    check_expert(folder, checkpoint)
    assert "the file has changed since it was opened" in caplog.messages[0]


def test_a_range_across_leaves_comes_as_its_own_bytes(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder})
    remote = fetched(folder, neighbours).remote
    assert remote is not None
    right = read_range(open_checkpoint(folder), MATRIX, 0, 64 * 96 * 4)
    for begin, end in ((0, 1), (1023, 1025), (5000, 12000), (24575, 24576), (700, 700)):
        assert remote.tensor(MATRIX, begin, end) == right[begin:end]
    assert all(begin % LEAF_BYTES == 0 for _, begin, _ in neighbours.reads["a"])


# A checkpoint of this node whose hashes are not kept.


@pytest.fixture
def unhashed(folder: Path, tmp_path: Path) -> Path:
    """A copy of the served checkpoint of which no hashes are kept."""
    return copy_of(folder, tmp_path / "unhashed")


def test_where_no_hashes_are_kept_a_peers_are_taken(
    folder: Path, unhashed: Path, other: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    identity = identity_of(open_checkpoint(folder))
    hashed.clear()
    neighbours = FakeNeighbours({"a": Path(HERE), "b": folder})
    checkpoint = open_model(str(unhashed), identity, neighbours)
    assert checkpoint.remote is None
    assert checkpoint.hashes is not None
    check_expert(folder, checkpoint)
    assert neighbours.reads == {"a": [], "b": []}
    flip_in_tensor(unhashed, MATRIX, 9000)
    with pytest.raises(CheckpointError, match="differ from the checkpoint that is served"):
        check_expert(folder, checkpoint)
    copy = copy_of(other, tmp_path / "another")  # is passed by
    checkpoint = open_model(str(copy), identity, neighbours)
    assert checkpoint.remote is not None
    check_expert(folder, checkpoint)
    assert hashed == []


def test_many_leaves_come_in_several_answers(
    folder: Path, unhashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(open_checkpoint(folder))
    monkeypatch.setattr(remote_files, "CHUNK_BYTES", 4 * 24 * 32)  # four experts' matrices
    asked: list[list[str]] = []
    leaves_of = FakePeer.leaves

    def leaves(peer: FakePeer, names: Sequence[str]) -> Future[dict[str, Any]]:
        asked.append(list(names))
        return leaves_of(peer, names)

    monkeypatch.setattr(FakePeer, "leaves", leaves)
    checkpoint = open_model(str(unhashed), identity, FakeNeighbours({"a": folder}))
    assert sorted(name for batch in asked for name in batch) == sorted(checkpoint.tensors)
    assert len(asked) > 10
    assert max(map(len, asked)) > 1
    check_expert(folder, checkpoint)


def test_without_a_peer_that_has_it_this_nodes_files_are_hashed(
    folder: Path, unhashed: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertmesh.peers")
    identity = identity_of(open_checkpoint(folder))
    checkpoint = open_model(str(unhashed), identity, FakeNeighbours({"a": Path(HERE), "b": other}))
    check_expert(folder, checkpoint)
    assert (unhashed / BESIDE).is_file()
    assert "no kept hashes of" in caplog.messages[0]


# A peer that hashes its checkpoint first.


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_peer_that_hashes_is_waited_for_while_it_gets_on(
    folder: Path, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hashing goes on for some answers of the reader, or for ever without getting on."""
    started: list[Path] = []
    release = threading.Event()

    def slow(checkpoint: Checkpoint, watch: Callable[[int, int], None]) -> Any:
        started.append(checkpoint.folder)
        for step in range(5):
            if goes_on:
                watch(step, 5)
            if release.wait(0.06 if goes_on else 5.0):
                break
        return hash_table_of(checkpoint)

    identity = identity_of(open_checkpoint(folder))
    monkeypatch.setattr(peers, "OPEN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(reader_module, "HASHING_ANSWER_S", 0.03)
    monkeypatch.setattr(reader_module, "hash_table_of", slow)
    try:
        if goes_on:
            check_expert(folder, open_model(HERE, identity, FakeNeighbours({"a": folder})))
        else:
            with pytest.raises(CheckpointMissingError, match="did not hash its checkpoint in"):
                open_model(HERE, identity, FakeNeighbours({"a": folder}))
    finally:
        release.set()
    assert started == [folder]


def test_a_reader_whose_files_change_while_it_hashes_opens_them_anew(
    folder: Path, tmp_path: Path
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    reader = CheckpointReader(str(copy))
    reader._checkpoint = open_checkpoint(copy)
    flip_in_tensor(copy, NORM)
    assert "changed since it was opened" in reader.open()["error"]["message"]
    assert "error" not in reader.open()
