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
from experts.checkpoint import identity as identity_module
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.expert_weights import load_expert
from experts.checkpoint.hash_cache import BESIDE
from experts.checkpoint.identity import hash_table_of, identity_of
from experts.checkpoint.remote import peers, remote_files
from experts.checkpoint.remote import remote_reader as reader_module
from experts.checkpoint.remote.remote_files import Neighbours, open_model
from experts.checkpoint.remote.remote_reader import CheckpointReader, SmallFile
from experts.checkpoint.stored import read_range
from router.gateway.input.models import load_models
from router.gateway.input.tokenizer import Tokenizer
from router.model.model import load_dense
from router.served import ServedModel, inspect_models
from tests.arrays import loaded
from tests.checkpoints import copy_of, save_mixtral
from tests.unit.experts.checkpoint.changed_files import flip_in_tensor
from tests.unit.router.config.test_config import config_of

CPU = torch.device("cpu")
LEAF_BYTES, CHUNK_BYTES = 1024, 4096
HERE = "/not/on/this/node"
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


def check_expert(folder: Path, checkpoint: Checkpoint) -> None:
    """Check that an expert comes bit for bit as from the folder."""
    ours = loaded(checkpoint, 1, 2, "float32")
    right = loaded(open_checkpoint(folder), 1, 2, "float32")
    assert torch.equal(ours.gate_up, right.gate_up)
    assert torch.equal(ours.down, right.down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_is_fetched_whole_and_nothing_else_is(tmp_path: Path, dtype: torch.dtype) -> None:
    save_mixtral(tmp_path, dtype)
    neighbours = FakeNeighbours({"a": None, "b": tmp_path})
    checkpoint = fetched(tmp_path, neighbours)
    assert checkpoint.remote is not None
    assert checkpoint.remote.fetched_bytes == 0
    ours = loaded(checkpoint, 1, 2, dtype_name(dtype))
    right = loaded(open_checkpoint(tmp_path), 1, 2, dtype_name(dtype))
    assert torch.equal(ours.gate_up, right.gate_up)
    assert torch.equal(ours.down, right.down)
    assert ours.down.dtype == dtype
    assert checkpoint.remote.fetched_bytes == 3 * 64 * 96 * dtype.itemsize
    parts = checkpoint.family.expert_tensors(checkpoint.config, 1, 2).parts()
    assert {name for name, _, _ in neighbours.reads["b"]} == {part.name for part in parts}
    assert all(0 < end - begin <= CHUNK_BYTES for _, begin, end in neighbours.reads["b"])
    assert sum(end - begin for _, begin, end in neighbours.reads["b"]) == (
        checkpoint.remote.fetched_bytes
    )
    assert checkpoint.remote.summary().endswith("from another node")


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
    with pytest.MonkeyPatch.context() as patch:
        neighbours = FakeNeighbours({"a": folder})
        patch.setattr("router.gateway.input.models.RayNeighbours", lambda: neighbours)
        tokenizer = load_models((model,))["m"].tokenizer
    right = Tokenizer.load(str(folder), (0,))
    text = "the quick brown fox, at last: ü"
    assert tokenizer.encode(text) == right.encode(text)
    assert tokenizer.chat_prompt([{"role": "user", "content": "x"}]) == "user: x\nassistant:"
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


@dataclass
class LyingPeer(FakePeer):
    """Its headers say that a tensor has a petabyte."""

    def open(self) -> Future[dict[str, Any]]:
        told = self.reader.open()
        name, (file, shape, dtype, begin, _) = next(iter(told["tensors"].items()))
        told["tensors"][name] = (file, shape, dtype, begin, begin + (1 << 50))
        return done(lambda: told)


@pytest.mark.parametrize("liars", [["a"], ["a", "b"]])
def test_a_peer_whose_headers_disagree_with_themselves_is_passed_over(
    folder: Path, liars: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder})
    honest = neighbours.connect

    def connect(node: str, path: str) -> FakePeer:
        peer = honest(node, path)
        return LyingPeer(node, peer.reader, None, peer.reads) if node in liars else peer

    monkeypatch.setattr(neighbours, "connect", connect)
    if liars == ["a"]:
        check_expert(folder, fetched(folder, neighbours))
        return
    with pytest.raises(CheckpointMissingError, match="do not match its shape"):
        fetched(folder, neighbours)


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


@pytest.mark.parametrize("fault", [damaged, short, dies])
def test_a_fetch_goes_on_at_another_peer_from_the_last_good_chunk(
    folder: Path, fault: Fault
) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder}, {"a": fault})
    check_expert(folder, fetched(folder, neighbours))
    assert neighbours.reads["b"]
    first = neighbours.reads["b"][0]
    assert first == neighbours.reads["a"][2]  # what came well is not asked for again


def test_a_peer_that_hangs_is_left(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder}, hanging=["a"])
    check_expert(folder, fetched(folder, neighbours))
    assert neighbours.reads["a"]
    assert neighbours.reads["b"]


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


def test_the_only_peer_is_asked_again(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder}, {"a": damaged})
    check_expert(folder, fetched(folder, neighbours))
    assert len(neighbours.connected) > 1


def test_a_peer_that_fails_for_ever_ends_the_fetch_with_a_typed_error(folder: Path) -> None:
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
    assert "is not the checkpoint being served" in caught.value.message
    assert "node a" in caught.value.message
    assert "node b" in caught.value.message
    assert "no such folder" in caught.value.message


def test_another_checkpoint_here_is_passed_by(folder: Path, other: Path) -> None:
    identity = identity_of(open_checkpoint(folder))
    checkpoint = open_model(str(other), identity, FakeNeighbours({"a": folder}))
    assert checkpoint.remote is not None
    check_expert(folder, checkpoint)
    with pytest.raises(CheckpointMissingError, match=r"\(this node: .*deploy again\); put it"):
        open_model(str(other), identity, FakeNeighbours({}))


def test_what_is_here_is_read_here(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder})
    identity = identity_of(open_checkpoint(folder))
    assert open_model(str(folder), identity, neighbours).remote is None
    assert open_model(str(folder), None, None).remote is None
    assert neighbours.connected == []


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


def test_a_tensor_that_no_header_names_is_not_read(folder: Path) -> None:
    reader = CheckpointReader(str(folder))
    assert "is not open" in reader.read("model.norm.weight", 0, 4)["error"]["message"]
    assert "error" not in reader.open()
    for name, begin, end in (
        ("../../etc/passwd", 0, 4),
        ("config.json", 0, 4),
        ("model.norm.weight", -1, 4),
        ("model.norm.weight", 0, 1 << 20),
        ("model.norm.weight", 8, 4),
        ("model.norm.weight", 0, reader_module.MAX_CHUNK_BYTES + 1),
    ):
        assert set(reader.read(name, begin, end)) == {"error"}, (name, begin, end)


def test_only_configuration_and_tokenizer_files_are_given_away(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    (tmp_path / "secret.pem").write_text("no")
    (tmp_path / "inner").mkdir()
    told = CheckpointReader(str(tmp_path)).open()
    assert "tokenizer.json" in told["small_files"]
    assert not {"secret.pem", "inner", "model.safetensors"} & set(told["small_files"])


def test_a_peer_cannot_have_a_file_written_elsewhere(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder})
    peer = neighbours.connect("a", HERE)
    told = peer.reader.open()
    told["small_files"]["../../evil.json"] = SmallFile.of(b"{}")
    peer.reader.open = lambda: told  # type: ignore[method-assign]
    neighbours.connect = lambda node, path: peer  # type: ignore[method-assign]
    with pytest.raises(CheckpointMissingError, match="is not a plain file name"):
        fetched(folder, neighbours)


class DyingPeer(FakePeer):
    """Dies before it has opened anything."""

    def open(self) -> Future[dict[str, Any]]:
        def die() -> dict[str, Any]:
            raise OSError("the node is gone")

        return done(die)


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

    def connect(node: str, path: str) -> FakePeer:
        reader = CheckpointReader(str(neighbours.folders[node] or path))
        fault = neighbours.faults.get(node)
        peer = (DyingPeer if node == "a" else FakePeer)(node, reader, fault, [])
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


def test_a_released_peer_is_found_again(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder})
    checkpoint = fetched(folder, neighbours)
    check_expert(folder, checkpoint)
    assert checkpoint.remote is not None
    checkpoint.remote.release()
    check_expert(folder, checkpoint)
    assert neighbours.connected == ["a", "a"]


# What a peer's bytes are verified against.


def altered(
    neighbours: FakeNeighbours, node: str, call: str, change: Callable[[dict[str, Any]], None]
) -> None:
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


NORM = "model.norm.weight"


def other_hash(answer: dict[str, Any]) -> None:
    answer["hashes"][NORM] = bytes(32)


def hash_missing(answer: dict[str, Any]) -> None:
    del answer["hashes"][NORM]


def hashes_shifted(answer: dict[str, Any]) -> None:
    """Move a byte from a hash to the next one, so that all together are the same bytes."""
    first, second = sorted(answer["hashes"])[:2]
    both = answer["hashes"][first] + answer["hashes"][second]
    answer["hashes"] |= {first: both[:31], second: both[31:]}


def other_config(answer: dict[str, Any]) -> None:
    config = answer["small_files"]["config.json"].data.replace(b"1e-05", b"2e-05")
    answer["small_files"]["config.json"] = SmallFile.of(config)


def broken_config(answer: dict[str, Any]) -> None:
    answer["small_files"]["config.json"] = SmallFile.of(b"{")


def other_dtype(answer: dict[str, Any]) -> None:
    file, shape, _, begin, end = answer["tensors"][NORM]
    answer["tensors"][NORM] = (file, (shape[0] * 2,), "BF16", begin, end)


def small_file_damaged(answer: dict[str, Any]) -> None:
    good = answer["small_files"]["tokenizer.json"]
    answer["small_files"]["tokenizer.json"] = SmallFile(good.data + b" ", good.hash)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_hash, "is not the checkpoint being served"),
        (hash_missing, "sent hashes of tensors that its headers do not name"),
        (hashes_shifted, "sent hashes of tensors that its headers do not name"),
        (other_config, "is not the checkpoint being served"),
        (broken_config, "is not JSON"),
        (other_dtype, "has shape"),
        (small_file_damaged, "tokenizer.json arrived corrupt"),
    ],
)
def test_a_peer_whose_table_is_not_that_of_the_served_checkpoint_is_passed_over(
    folder: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder})
    altered(neighbours, "a", "open", change)
    check_expert(folder, fetched(folder, neighbours))
    assert neighbours.reads["a"] == []
    alone = FakeNeighbours({"a": folder})
    altered(alone, "a", "open", change)
    with pytest.raises(CheckpointMissingError, match=words):
        fetched(folder, alone)


def leaf_changed(answer: dict[str, Any]) -> None:
    answer["leaves"] = [bytes([leaves[0] ^ 1]) + leaves[1:] for leaves in answer["leaves"]]


def leaf_missing(answer: dict[str, Any]) -> None:
    answer["leaves"] = [leaves[:-32] for leaves in answer["leaves"]]


def no_leaves(answer: dict[str, Any]) -> None:
    answer["leaves"] = []


@pytest.mark.parametrize("change", [leaf_changed, leaf_missing, no_leaves])
def test_a_peer_that_sends_wrong_leaves_is_left_before_its_bytes_are_taken(
    folder: Path, change: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder})
    altered(neighbours, "a", "leaves", change)
    check_expert(folder, fetched(folder, neighbours))
    assert "node a" in caplog.messages[0]
    assert "sent" in caplog.messages[0]
    assert "hashes of" in caplog.messages[0]
    parts = {name for name, _, _ in neighbours.reads["b"]}
    assert len(parts) == 3  # all three matrices came from there


def test_bytes_that_changed_on_the_peers_disk_are_not_taken(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reader's table is right, and was right for its file: the bytes have changed since."""
    bad = copy_of(folder, tmp_path / "bad")
    identity_of(open_checkpoint(bad))
    neighbours = FakeNeighbours({"a": bad, "b": folder})
    checkpoint = fetched(folder, neighbours)
    flip_in_tensor(bad, "model.layers.1.block_sparse_moe.experts.2.w1.weight", 9000)
    check_expert(folder, checkpoint)
    assert "the file has changed since it was opened" in caplog.messages[0]


def test_wrong_bytes_are_named_by_tensor_and_place(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    neighbours = FakeNeighbours({"a": folder, "b": folder}, {"a": damaged})
    check_expert(folder, fetched(folder, neighbours))
    name = neighbours.reads["a"][2][0]
    assert f"sent wrong bytes 8192 to 9216 of {name}" in caplog.messages[0]


def test_a_range_across_leaves_comes_as_its_own_bytes(folder: Path) -> None:
    neighbours = FakeNeighbours({"a": folder})
    remote = fetched(folder, neighbours).remote
    assert remote is not None
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    right = read_range(open_checkpoint(folder), name, 0, 64 * 96 * 4)
    for begin, end in ((0, 1), (1023, 1025), (5000, 12000), (24575, 24576), (700, 700)):
        assert remote.tensor(name, begin, end) == right[begin:end]
    assert all(begin % LEAF_BYTES == 0 for _, begin, _ in neighbours.reads["a"])


# A checkpoint of this node whose hashes are not kept.


@pytest.fixture
def unhashed(folder: Path, tmp_path: Path) -> Path:
    """A copy of the served checkpoint of which no hashes are kept."""
    return copy_of(folder, tmp_path / "unhashed")


def no_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(checkpoint: Checkpoint, watch: object = None) -> None:
        raise AssertionError(f"hashes all of {checkpoint.folder}")

    monkeypatch.setattr(identity_module, "hash_tensors", fail)


def test_where_no_hashes_are_kept_a_peers_are_taken(
    folder: Path, unhashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(open_checkpoint(folder))
    no_hashing(monkeypatch)
    neighbours = FakeNeighbours({"a": Path(HERE), "b": folder})
    checkpoint = open_model(str(unhashed), identity, neighbours)
    assert checkpoint.remote is None
    assert checkpoint.hashes is not None
    check_expert(folder, checkpoint)
    assert neighbours.reads == {"a": [], "b": []}
    flip_in_tensor(unhashed, "model.layers.1.block_sparse_moe.experts.2.w1.weight", 9000)
    with pytest.raises(CheckpointError, match="differ from the checkpoint that is served"):
        check_expert(folder, checkpoint)


def test_many_leaves_come_in_several_answers(
    folder: Path, unhashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(open_checkpoint(folder))
    monkeypatch.setattr(remote_files, "CHUNK_BYTES", 4 * 24 * 32)  # four experts' matrices
    asked: list[list[str]] = []
    neighbours = FakeNeighbours({"a": folder})
    leaves_of = FakePeer.leaves

    def leaves(peer: FakePeer, names: Sequence[str]) -> Future[dict[str, Any]]:
        asked.append(list(names))
        return leaves_of(peer, names)

    monkeypatch.setattr(FakePeer, "leaves", leaves)
    checkpoint = open_model(str(unhashed), identity, neighbours)
    names = [name for batch in asked for name in batch]
    assert sorted(names) == sorted(checkpoint.tensors)
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


def test_another_checkpoint_here_without_kept_hashes_is_passed_by(
    folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(open_checkpoint(folder))
    copy_of(other, tmp_path / "other")
    no_hashing(monkeypatch)
    neighbours = FakeNeighbours({"a": folder})
    checkpoint = open_model(str(tmp_path / "other"), identity, neighbours)
    assert checkpoint.remote is not None
    check_expert(folder, checkpoint)


# A peer that hashes its checkpoint first.


@dataclass
class SlowHashing:
    """Hashing that goes on for some answers of the reader, or for ever without getting on."""

    goes_on: bool
    release: threading.Event = field(default_factory=threading.Event)
    started: int = 0

    def hash_table_of(self, checkpoint: Checkpoint, watch: Callable[[int, int], None]) -> Any:
        self.started += 1
        for step in range(5):
            if self.goes_on:
                watch(step, 5)
            if self.release.wait(0.06 if self.goes_on else 5.0):
                break
        return hash_table_of(checkpoint)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_peer_that_hashes_is_waited_for_while_it_gets_on(
    folder: Path, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = identity_of(open_checkpoint(folder))
    monkeypatch.setattr(peers, "OPEN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(reader_module, "HASHING_ANSWER_S", 0.03)
    slow = SlowHashing(goes_on)
    monkeypatch.setattr(reader_module, "hash_table_of", slow.hash_table_of)
    try:
        if goes_on:
            check_expert(folder, open_model(HERE, identity, FakeNeighbours({"a": folder})))
        else:
            with pytest.raises(CheckpointMissingError, match="did not hash its checkpoint in"):
                open_model(HERE, identity, FakeNeighbours({"a": folder}))
    finally:
        slow.release.set()
    assert slow.started == 1


def test_a_reader_whose_files_change_while_it_hashes_opens_them_anew(
    folder: Path, tmp_path: Path
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    reader = CheckpointReader(str(copy))
    reader._checkpoint = open_checkpoint(copy)
    flip_in_tensor(copy, NORM)
    assert "changed since it was opened" in reader.open()["error"]["message"]
    assert "error" not in reader.open()
