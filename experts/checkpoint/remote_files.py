"""A checkpoint on another node: finding it, and fetching the needed tensors.

A process on a node without a model's folder asks the other nodes (:class:`Neighbours`) and chooses
a peer with the served checkpoint (:mod:`experts.checkpoint.identity`). It fetches the needed
tensors in chunks, each with the hash that the peer computed. When a peer dies, hangs or sends
damaged bytes, the fetch continues after the last good chunk, at another peer or at the same. The
bytes stay in memory and are not written to disk.
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
"""The most chunks under way, so that the peer reads a chunk while another travels."""
PEERS_AT_ONCE = 8
MAX_FAILURES = 5
"""The number of failures without a good chunk in between after which a fetch fails."""
OTHER_CHECKPOINT = "is another checkpoint than the one that is served"

logger = logging.getLogger("expertmesh.peers")


class PeerError(Exception):
    """A peer failed, or its answer is wrong; the message is the reason."""


class Peer(Protocol):
    """A :class:`experts.checkpoint.remote_reader.CheckpointReader` on another node.

    The reader ends when this object is dropped. A future with an exception means that the peer has
    failed; any other result is that of the reader.
    """

    node: str

    def open(self) -> Future[dict[str, Any]]:
        """Call the reader's ``open``."""
        ...

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """Call the reader's ``read``."""
        ...


class Neighbours(Protocol):
    """The cluster's other nodes."""

    def nodes(self) -> Sequence[str]:
        """Return the ids of the living nodes, without this node."""
        ...

    def connect(self, node: str, path: str) -> Peer:
        """Start a reader of the model at ``path`` on a node; returns at once."""
        ...


def open_model(path: str, identity: str | None, neighbours: Neighbours | None) -> Checkpoint:
    """Open a model's checkpoint in this node's folder, or else at a peer.

    ``identity`` is that of the served checkpoint. It is ``None`` before it is known: then any
    checkpoint at ``path`` is right, and :class:`CheckpointError` is raised for a wrong checkpoint
    on this node. Raises :class:`CheckpointMissingError`, with the answer of every asked node, when
    no node has the checkpoint.
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
    """A checkpoint's files on peers, any of which can serve a fetch; for one thread at a time."""

    def __init__(
        self, path: str, identity: str | None, neighbours: Neighbours, reason: str
    ) -> None:
        """Find a first peer; ``reason`` is the error of this node's own folder.

        Raises :class:`CheckpointMissingError` when no node has the checkpoint.
        """
        self._path = path
        self._identity = identity
        self._neighbours = neighbours
        self._reason = reason
        self._peer: Peer | None = None
        self._failed: list[str] = []
        """The nodes that have failed since the last good chunk, in order."""
        self.fetched_bytes = 0
        self.fetched_s = 0.0
        opened = self._find()
        self._identity = opened["identity"]
        self.small_files: Mapping[str, bytes] = {
            name: chunk.data for name, chunk in opened["small_files"].items()
        }
        folder = Path(opened["folder"])
        config_file = folder / "config.json"
        config = parse_json(self.small_files.get("config.json", b""), config_file)
        tensors = _tensors_of(opened)
        self.checkpoint = checkpoint_of(folder, config, lambda: tensors, self)

    @property
    def identity(self) -> str:
        """The identity of the checkpoint that is fetched."""
        assert self._identity is not None  # the first peer has sent it
        return self._identity

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes of a tensor.

        Raises :class:`CheckpointMissingError` when no node has the checkpoint any more, or when
        peers have failed :data:`MAX_FAILURES` times in a row.
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
                self._drop_failed(self._peer, error)
        self.fetched_bytes += len(data)
        self.fetched_s += time.monotonic() - started_s
        return data

    def release(self) -> None:
        """End the peer's process; the next :meth:`tensor` finds a peer again."""
        self._peer = None

    def summary(self) -> str:
        """Return the fetched bytes and seconds so far as text."""
        return f"{self.fetched_bytes / 1e6:.1f} MB in {self.fetched_s:.1f} s from another node"

    def _drop_failed(self, peer: Peer, error: PeerError) -> None:
        logger.warning(
            "node %s, %s: %s; fetching from another node", peer.node[:10], self._path, error
        )
        self._peer = None
        self._failed.append(peer.node)
        if len(self._failed) >= MAX_FAILURES:
            raise CheckpointMissingError(
                f"could not be fetched: peers failed {len(self._failed)} times, the last one: "
                f"{error}",
                self._path,
            )

    def _find(self) -> dict[str, Any]:
        """Find and keep a peer with the checkpoint; returns its answer.

        Peers that failed lately are asked last.
        """
        reasons = [f"this node: {self._reason}"]
        nodes = list(self._neighbours.nodes())
        random.shuffle(nodes)  # so that not all processes fetch from one node
        nodes.sort(key=self._failed.count)
        for first in range(0, len(nodes), PEERS_AT_ONCE):
            asked = nodes[first : first + PEERS_AT_ONCE]
            peers = [self._neighbours.connect(node, self._path) for node in asked]
            for peer, answer in _as_answered(peers):
                try:
                    opened = self._checked(_answer_of(answer, 0.0))
                except PeerError as error:
                    reasons.append(f"node {peer.node[:10]}: {error}")
                else:
                    self._peer = peer
                    return opened
        raise CheckpointMissingError(
            f"no node of the cluster has the checkpoint ({'; '.join(reasons)}); put it under this "
            "path on one of them, or add a node that has it",
            self._path,
        )

    def _checked(self, opened: dict[str, Any]) -> dict[str, Any]:
        """Return a peer's answer; raises :class:`PeerError` if it is wrong or damaged."""
        if self._identity not in (None, opened["identity"]):
            raise PeerError(f"{opened['folder']}: {OTHER_CHECKPOINT}")
        _tensors_of(opened)
        for name, chunk in opened["small_files"].items():
            if Path(name).name != name:
                raise PeerError(f"{shown(name)} is not a plain file name")
            if not chunk.is_whole():
                raise PeerError(f"{name} came damaged")
        return opened


def _tensors_of(opened: dict[str, Any]) -> dict[str, TensorInfo]:
    """Return the headers in a peer's answer.

    Raises :class:`PeerError` for a tensor whose number of bytes contradicts its shape.
    """
    tensors = {name: TensorInfo(*info) for name, info in opened["tensors"].items()}
    for name, info in tensors.items():
        if info.end - info.begin != prod(info.shape) * STORED_BYTES.get(info.dtype, -1):
            raise PeerError(f"the bytes of tensor {shown_name(name)} do not fit its shape")
    return tensors


def _as_answered(peers: Sequence[Peer]) -> Iterator[tuple[Peer, Future[dict[str, Any]]]]:
    """Ask peers to open the checkpoint; yields each that answers, then the silent peers."""
    waiting = {peer.open(): peer for peer in peers}
    try:
        for answer in as_completed(list(waiting), OPEN_TIMEOUT_S):
            yield waiting.pop(answer), answer
    except FutureTimeoutError:
        yield from ((peer, answer) for answer, peer in waiting.items())


def _chunks(peer: Peer, name: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield a tensor's checked bytes; raises :class:`PeerError` at the first failure."""
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
        # Not ``result``: its exception has a traceback whose frames refer to the peers and to this
        # future. This cycle would keep the peers' processes until the garbage collector runs, which
        # is rare here.
        failure = answer.exception(max(0.0, timeout_s))  # any error of Ray
    except FutureTimeoutError:
        answer.cancel()
        raise PeerError("did not answer in time") from None
    if failure is not None:
        raise PeerError(f"died ({type(failure).__name__})")
    reply = answer.result()
    if "error" in reply:
        raise PeerError(str(error_from_wire(reply["error"])))
    return reply
