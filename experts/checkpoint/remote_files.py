"""A checkpoint on another node: found there, and only what is needed of it fetched, checked.

A node whose disk lacks a model's folder need not fail. Whoever needs the model there asks the other
nodes (:class:`Neighbours`), takes one whose checkpoint is the one that is served
(:mod:`experts.checkpoint.identity`), and fetches the tensors that it needs in chunks, each with the
hash that its reader computed. When a peer dies, hangs or sends damaged bytes, the fetch goes on at
another, or the same, from the last good chunk. Bytes go straight into memory; nothing is written to
disk.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError
from math import prod
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import (
    CheckpointError,
    CheckpointMissingError,
    error_from_wire,
    shown,
    shown_name,
)
from experts.checkpoint.checkpoint import Checkpoint, checkpoint_of, open_checkpoint, resolve_folder
from experts.checkpoint.config import parse_json
from experts.checkpoint.identity import identity_of
from experts.checkpoint.shards import STORED_BYTES, TensorInfo

OPEN_TIMEOUT_S = 60.0
CHUNK_TIMEOUT_S = 30.0
CHUNK_BYTES = 8 << 20
CHUNKS_AHEAD = 3
"""Chunks that are asked for before they are needed: one is read while another travels."""
ASKED_AT_ONCE = 8
MAX_FAILURES = 5
"""How often a fetch goes on elsewhere without a single good chunk in between."""
OTHER_CHECKPOINT = "is another checkpoint than the one that is served"

logger = logging.getLogger("expertmesh.peers")


class PeerError(Exception):
    """A peer did not do what was asked: why."""


class Peer(Protocol):
    """A reader (:class:`experts.checkpoint.remote_reader.CheckpointReader`) on another node; let it
    go to end it.

    What the futures raise means that the peer failed; their results are as the reader returns them.
    """

    node: str

    def open(self) -> Future[dict[str, Any]]:
        """Ask it to open the checkpoint."""
        ...

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """Ask it for bytes of a tensor."""
        ...


class Neighbours(Protocol):
    """The cluster's other nodes."""

    def nodes(self) -> Sequence[str]:
        """Return the ids of the nodes that live, without the own one."""
        ...

    def connect(self, node: str, path: str) -> Peer:
        """Start a reader of the model at ``path`` on a node; returns at once."""
        ...


def open_model(path: str, identity: str | None, neighbours: Neighbours | None) -> Checkpoint:
    """Open a model's checkpoint: the one in this node's folder, or else a peer's.

    ``identity`` is that of the checkpoint that is served; ``None`` while it is not known yet, when
    whatever lies at ``path`` is right. Raises :class:`CheckpointError` for what is wrong here where
    that is for the user to mend; :class:`CheckpointMissingError` that says which nodes were asked
    and what each said when none has it.
    """
    try:
        checkpoint = open_checkpoint(resolve_folder(path))
        if identity in (None, identity_of(checkpoint)):
            return checkpoint
        reason = CheckpointError(f"{OTHER_CHECKPOINT}; deploy again", str(checkpoint.folder))
    except CheckpointError as error:
        if identity is None and not isinstance(error, CheckpointMissingError):
            raise
        reason = error
    if neighbours is None or (identity is None and not neighbours.nodes()):
        raise reason
    if not isinstance(reason, CheckpointMissingError):
        logger.warning("%s; asking other nodes", reason)
    return PeerFiles(path, identity, neighbours, str(reason)).checkpoint


class PeerFiles:
    """A checkpoint's files as peers have them; whichever lives is asked.

    For one thread at a time.
    """

    def __init__(
        self, path: str, identity: str | None, neighbours: Neighbours, reason: str
    ) -> None:
        """Find a first peer; ``reason`` says why it is needed.

        Raises :class:`CheckpointMissingError` when no node has the checkpoint.
        """
        self._path = path
        self._identity = identity
        self._neighbours = neighbours
        self._reason = reason
        self._peer: Peer | None = None
        self._failed: list[str] = []
        """Nodes that failed since the last good chunk, the latest last."""
        self.fetched_bytes = 0
        self.fetched_s = 0.0
        told = self._find()
        self._identity = told["identity"]
        self.small_files: Mapping[str, bytes] = {
            name: chunk.data for name, chunk in told["small_files"].items()
        }
        folder = Path(told["folder"])
        config_file = folder / "config.json"
        config = parse_json(self.small_files.get("config.json", b""), config_file)
        tensors = _tensors_of(told)
        self.checkpoint = checkpoint_of(folder, config, lambda: tensors, self)

    @property
    def identity(self) -> str:
        """The identity of the checkpoint that is fetched."""
        assert self._identity is not None  # the first peer told it
        return self._identity

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes of a tensor; raises :class:`CheckpointMissingError` as a last resort.

        That is when no node has the checkpoint any more, or peers failed :data:`MAX_FAILURES` times
        in a row.
        """
        started_s = time.monotonic()
        info = self.checkpoint.tensors[name]
        stop = info.end - info.begin if end is None else end
        data = bytearray(stop - begin)
        done = 0
        while done < len(data):
            if self._peer is None:
                self._find()
            assert self._peer is not None
            try:
                for piece in _chunks(self._peer, name, begin + done, stop):
                    data[done : done + len(piece)] = piece
                    done += len(piece)
                    self._failed.clear()
            except PeerError as error:
                self._lose(self._peer, error)
        self.fetched_bytes += len(data)
        self.fetched_s += time.monotonic() - started_s
        return data

    def release(self) -> None:
        """Let the peer go for now, and with it its process; the next tensor finds one again."""
        self._peer = None

    def told(self) -> str:
        """Return what has been fetched so far, for people."""
        return f"{self.fetched_bytes / 1e6:.1f} MB in {self.fetched_s:.1f} s from another node"

    def _lose(self, peer: Peer, error: PeerError) -> None:
        logger.warning("node %s, %s: %s; going on elsewhere", peer.node[:10], self._path, error)
        self._peer = None
        self._failed.append(peer.node)
        if len(self._failed) >= MAX_FAILURES:
            raise CheckpointMissingError(
                f"could not be fetched: peers failed {len(self._failed)} times, the last one: "
                f"{error}",
                self._path,
            )

    def _find(self) -> dict[str, Any]:
        """Find a peer with the checkpoint and keep it; returns what it told.

        Those that failed lately are asked last, since there may be no other.
        """
        said = [f"this node: {self._reason}"]
        nodes = list(self._neighbours.nodes())
        random.shuffle(nodes)  # or all who lack it would fetch from the same
        nodes.sort(key=self._failed.count)
        for first in range(0, len(nodes), ASKED_AT_ONCE):
            asked = nodes[first : first + ASKED_AT_ONCE]
            peers = [self._neighbours.connect(node, self._path) for node in asked]
            for peer, answer in _as_answered(peers):
                try:
                    told = self._checked(_answer_of(answer, 0.0))
                except PeerError as error:
                    said.append(f"node {peer.node[:10]}: {error}")
                else:
                    self._peer = peer
                    return told
        raise CheckpointMissingError(
            f"no node of the cluster has the checkpoint ({'; '.join(said)}); put it under this "
            "path on one of them, or add a node that has it",
            self._path,
        )

    def _checked(self, told: dict[str, Any]) -> dict[str, Any]:
        """Return what a peer told of its checkpoint, if it is whole and the one that is served."""
        if self._identity not in (None, told["identity"]):
            raise PeerError(f"{told['folder']}: {OTHER_CHECKPOINT}")
        _tensors_of(told)
        for name, chunk in told["small_files"].items():
            if Path(name).name != name:
                raise PeerError(f"{shown(name)} is not a plain file name")
            if not chunk.is_whole():
                raise PeerError(f"{name} came damaged")
        return told


def _tensors_of(told: dict[str, Any]) -> dict[str, TensorInfo]:
    """Return the headers that a peer told; so many bytes are taken for a tensor as its shape says.

    Raises :class:`PeerError` for headers that disagree with themselves.
    """
    tensors = {name: TensorInfo(*info) for name, info in told["tensors"].items()}
    for name, info in tensors.items():
        if info.end - info.begin != prod(info.shape) * STORED_BYTES.get(info.dtype, -1):
            raise PeerError(f"told that tensor {shown_name(name)} has other bytes than its shape")
    return tensors


def _as_answered(peers: Sequence[Peer]) -> Iterator[tuple[Peer, Future[dict[str, Any]]]]:
    """Ask peers to open the checkpoint; yields each as it answers, at last those that do not."""
    waiting = {peer.open(): peer for peer in peers}
    try:
        for answer in as_completed(list(waiting), OPEN_TIMEOUT_S):
            yield waiting.pop(answer), answer
    except FutureTimeoutError:
        yield from ((peer, answer) for answer, peer in waiting.items())


def _chunks(peer: Peer, name: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield a tensor's bytes, checked; raises :class:`PeerError` at the first that do not come."""
    starts = iter(range(begin, end, CHUNK_BYTES))
    under_way: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    while True:
        while len(under_way) < CHUNKS_AHEAD and (start := next(starts, None)) is not None:
            stop = min(end, start + CHUNK_BYTES)
            under_way.append((stop - start, peer.read(name, start, stop)))
        if not under_way:
            return
        size, answer = under_way.popleft()
        chunk = _answer_of(answer, CHUNK_TIMEOUT_S)["chunk"]
        if len(chunk.data) != size or not chunk.is_whole():
            raise PeerError(f"a chunk of {name} came damaged")
        yield chunk.data


def _answer_of(answer: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    try:
        # Not ``result``: what it raises has a traceback, and so all frames' peers, in the future
        # that those frames refer to. Such a circle, and with it the peers' processes, would live
        # until Python looks for circles, which it does rarely here.
        failure = answer.exception(max(0.0, timeout_s))  # of Ray's many kinds of death
    except FutureTimeoutError:
        answer.cancel()
        raise PeerError("did not answer in time") from None
    if failure is not None:
        raise PeerError(f"died ({type(failure).__name__})")
    told = answer.result()
    if "error" in told:
        raise PeerError(str(error_from_wire(told["error"])))
    return told
