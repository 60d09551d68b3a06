"""A checkpoint on another node: finding it, and fetching the needed tensors.

A process on a node without a model's folder asks the other nodes (:class:`Neighbours`) and chooses
a peer whose hashes have the served identity as their root (:mod:`experts.checkpoint.hashes`). It
fetches the needed tensors in chunks of whole leaves. Each leaf is verified on arrival against the
peer's leaves, which were verified against the root. When a peer dies, hangs or sends wrong bytes,
the fetch continues after the last good chunk, at another peer or at the same. The bytes stay in
memory and are not written to disk.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, CheckpointMissingError, shown, shown_name
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.folder import described_folder, open_folder
from experts.checkpoint.hashes import (
    HASH_BYTES,
    HashTable,
    leaf_spans,
    num_leaves,
    root_of,
    tensor_hash,
    widened,
)
from experts.checkpoint.identity import check_samples, hash_table_of, kept_table_of
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.remote.peers import (
    Neighbours,
    Peer,
    PeerError,
    answer_of,
    as_answered,
    tensors_of,
)
from experts.checkpoint.stored import Stored, resolve_folder

CHUNK_TIMEOUT_S = 30.0
CHUNK_BYTES = 8 << 20
"""A multiple of a leaf's bytes."""
CHUNKS_AHEAD = 3
"""The most chunks under way, so that the peer reads a chunk while another travels."""
PEERS_AT_ONCE = 8
MAX_FAILURES = 5
"""The number of failures without a good chunk in between after which a fetch fails."""
OTHER_CHECKPOINT = "is not the checkpoint being served"

logger = logging.getLogger("expertmesh.peers")


def open_model(
    path: str, identity: str | None, neighbours: Neighbours | None
) -> Checkpoint | Mixture:
    """Open a checkpoint or a mixture in this node's folder, or else at a peer.

    ``identity`` is that of the served checkpoint, against which every byte is verified that is read
    of the result. The hashes for that are kept ones, or come from a peer, or are computed.
    ``identity`` is ``None`` before it is known: then any checkpoint at ``path`` is right, its bytes
    are not verified, and :class:`CheckpointError` is raised for a wrong checkpoint on this node.
    Raises :class:`CheckpointMissingError`, with the answer of every asked node, when no node has
    the checkpoint.
    """
    try:
        stored = open_folder(resolve_folder(path))
        if identity is None:
            return stored
        return replace(stored, hashes=_table_of(stored, path, identity, neighbours))
    except CheckpointError as error:
        if identity is None and not isinstance(error, CheckpointMissingError):
            raise
        reason = error
    if neighbours is None or (identity is None and not neighbours.nodes()):
        raise reason
    if not isinstance(reason, CheckpointMissingError):
        logger.warning("%s; asking other nodes", reason)
    return PeerFiles(path, identity, neighbours, str(reason)).stored


def _table_of(stored: Stored, path: str, identity: str, neighbours: Neighbours | None) -> HashTable:
    """Return the served model's hashes; this node's files appear to match it.

    Raises :class:`CheckpointError` when the files belong to another checkpoint.
    """
    table = kept_table_of(stored, identity)
    if table is None and neighbours is not None and neighbours.nodes():
        table = _table_of_peers(stored, path, identity, neighbours)
    if table is None:
        table = hash_table_of(stored)
    if table.identity != identity:
        raise CheckpointError(f"{OTHER_CHECKPOINT}; deploy again", str(stored.folder))
    return table


def _table_of_peers(
    stored: Stored, path: str, identity: str, neighbours: Neighbours
) -> HashTable | None:
    """Return the served checkpoint's hashes from a peer, or ``None`` if no peer has them.

    Raises :class:`CheckpointError` when a sample of this node's files differs from them.
    """
    try:
        files = PeerFiles(path, identity, neighbours, f"no kept hashes of {stored.folder}")
        leaves = files.all_leaves()
    except CheckpointMissingError as error:
        logger.info("%s", error)
        return None
    files.release()
    table = HashTable.of(stored.config, stored.tensors, leaves)
    check_samples(stored, table)
    return table


@dataclass(frozen=True, slots=True)
class _Opened:
    """A peer's answer, checked: the folder that it has, with its small files and hashes."""

    stored: Checkpoint | Mixture
    small_files: Mapping[str, bytes]
    hashes: Mapping[str, bytes]
    identity: str


class PeerFiles:
    """A checkpoint's files on peers, any of which can serve a fetch; for one thread at a time."""

    def __init__(
        self, path: str, identity: str | None, neighbours: Neighbours, reason: str
    ) -> None:
        """Find a first peer; ``reason`` is the error of this node's own folder.

        Raises :class:`CheckpointMissingError` when no node has the checkpoint.
        """
        self._path = path
        self._neighbours = neighbours
        self._reason = reason
        self._peer: Peer | None = None
        """The peer that is asked next; after a failure or a release there is none."""
        self._failed: list[str] = []
        """The nodes that have failed since the last good chunk, in order."""
        self._leaves: dict[str, bytes] = {}
        """The verified leaves so far, by tensor."""
        self.fetched_bytes = 0
        self.fetched_s = 0.0
        self._peer, opened = self._find(identity)
        self.identity = opened.identity
        """The identity of the checkpoint that is fetched."""
        self._hashes = opened.hashes
        self.small_files = opened.small_files
        self.stored = opened.stored

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes of a tensor, all of them verified.

        Raises :class:`CheckpointMissingError` when no node has the checkpoint any more, or when
        peers have failed :data:`MAX_FAILURES` times in a row.
        """
        started_at_s = time.monotonic()
        num_bytes = self.stored.tensors[name].num_bytes
        stop = num_bytes if end is None else end
        first, last = widened(begin, stop, num_bytes)
        data = bytearray(last - first)
        done = 0

        def fetch(peer: Peer) -> None:
            nonlocal done
            for piece in self._chunks(peer, name, first + done, last):
                data[done : done + len(piece)] = piece
                done += len(piece)
                self._failed.clear()

        if data:
            self._with_a_peer(fetch)
        self.fetched_bytes += len(data)
        self.fetched_s += time.monotonic() - started_at_s
        return data[begin - first : stop - first]

    def all_leaves(self) -> Mapping[str, bytes]:
        """Return the leaves of every tensor, verified; raises as :meth:`tensor` does."""
        missing = [name for name in self.stored.tensors if name not in self._leaves]
        while missing:
            asked = [missing.pop()]
            size = self._leaves_bytes(asked[0])
            while missing and (size := size + self._leaves_bytes(missing[-1])) <= CHUNK_BYTES:
                asked.append(missing.pop())

            def take(peer: Peer, names: list[str] = asked) -> None:
                self._take_leaves(names, peer.leaves(names))

            self._with_a_peer(take)
        return self._leaves

    def _leaves_bytes(self, name: str) -> int:
        return num_leaves(self.stored.tensors[name].num_bytes) * HASH_BYTES

    def release(self) -> None:
        """End the peer's process; the next :meth:`tensor` finds a peer again."""
        self._peer = None

    def summary(self) -> str:
        """Return the fetched bytes and seconds so far as text."""
        return f"{self.fetched_bytes / 1e6:.1f} MB in {self.fetched_s:.1f} s from another node"

    def _with_a_peer(self, call: Callable[[Peer], None]) -> None:
        """Call with a peer, and after each :class:`PeerError` with another one or the same."""
        while True:
            if self._peer is None:
                self._peer, _ = self._find(self.identity)
            peer = self._peer
            try:
                call(peer)
                return
            except PeerError as error:
                self._drop_failed(peer, error)

    def _drop_failed(self, peer: Peer, error: PeerError) -> None:
        logger.warning(
            "node %s, %s: %s; fetching from another node", peer.node[:10], self._path, error
        )
        self._peer = None
        self._failed.append(peer.node)
        if len(self._failed) >= MAX_FAILURES:
            raise CheckpointMissingError(
                f"could not be fetched: peers failed {len(self._failed)} times, lastly: {error}",
                self._path,
            )

    def _find(self, identity: str | None) -> tuple[Peer, _Opened]:
        """Find a peer with the checkpoint of an identity, or with any; returns its answer too.

        Peers that failed lately are asked last.
        """
        reasons = [f"this node: {self._reason}"]
        nodes = list(self._neighbours.nodes())
        random.shuffle(nodes)  # so that not all processes fetch from one node
        nodes.sort(key=self._failed.count)
        for first in range(0, len(nodes), PEERS_AT_ONCE):
            asked = nodes[first : first + PEERS_AT_ONCE]
            peers = [self._neighbours.connect(node, self._path) for node in asked]
            for peer, answer in as_answered(peers):
                try:
                    opened = self._checked(answer_of(answer, 0.0), identity)
                except PeerError as error:
                    reasons.append(f"node {peer.node[:10]}: {error}")
                else:
                    return peer, opened
        raise CheckpointMissingError(
            f"no node of the cluster has the checkpoint ({'; '.join(reasons)}); put it under this "
            "path on one of them, or add a node that has it",
            self._path,
        )

    def _checked(self, answer: dict[str, Any], wanted: str | None) -> _Opened:
        """Return a peer's answer; raises :class:`PeerError` if it is wrong or damaged.

        The identity is computed from the configuration and the tensors' hashes in the answer.
        """
        if "hashed_bytes" in answer:
            raise PeerError("did not hash its checkpoint in time")
        small_files = {}
        for name, file in answer["small_files"].items():
            if Path(name).name != name:
                raise PeerError(f"{shown(name)} is not a plain file name")
            if not file.is_whole():
                raise PeerError(f"{name} arrived corrupt")
            small_files[name] = file.data
        folder, tensors = Path(answer["folder"]), tensors_of(answer)
        try:
            stored = described_folder(folder, small_files, tensors, self)
        except CheckpointError as error:
            raise PeerError(str(error)) from None
        hashes = {name: answer["hashes"].get(name, b"") for name in stored.tensors}
        if any(len(tensor) != HASH_BYTES for tensor in hashes.values()):
            raise PeerError("sent hashes of tensors that its headers do not name")
        identity = root_of(stored.config, hashes)
        if wanted not in (None, identity):
            raise PeerError(f"{folder}: {OTHER_CHECKPOINT}")
        return _Opened(stored, small_files, hashes, identity)

    def _chunks(self, peer: Peer, name: str, begin: int, end: int) -> Iterator[bytes]:
        """Yield verified bytes of whole leaves; raises :class:`PeerError` at the first failure."""
        leaves = None if name in self._leaves else peer.leaves([name])
        starts = iter(range(begin, end, CHUNK_BYTES))
        under_way: deque[tuple[int, int, Future[dict[str, Any]]]] = deque()
        while True:
            while len(under_way) < CHUNKS_AHEAD and (start := next(starts, None)) is not None:
                stop = min(end, start + CHUNK_BYTES)
                under_way.append((start, stop, peer.read(name, start, stop)))
            if not under_way:
                return
            if leaves is not None:
                self._take_leaves([name], leaves)
                leaves = None
            start, stop, answer = under_way.popleft()
            chunk = answer_of(answer, CHUNK_TIMEOUT_S)["chunk"]
            self._check_chunk(name, start, stop, chunk)
            yield chunk

    def _take_leaves(self, names: Sequence[str], answer: Future[dict[str, Any]]) -> None:
        """Verify the leaves in an answer by the hashes of their tensors, and keep them."""
        received = answer_of(answer, CHUNK_TIMEOUT_S)["leaves"]
        if len(received) != len(names):
            raise PeerError(f"sent hashes of {len(received)} tensors, not of {len(names)}")
        for name, leaves in zip(names, received, strict=True):
            if tensor_hash(name, self.stored.tensors[name], leaves) != self._hashes[name]:
                raise PeerError(f"sent wrong hashes of {shown_name(name)}")
            self._leaves[name] = leaves

    def _check_chunk(self, name: str, begin: int, end: int, chunk: bytes) -> None:
        if len(chunk) != end - begin:
            raise PeerError(f"sent {len(chunk)} bytes of {shown_name(name)}, not {end - begin}")
        table = HashTable(self.identity, self._leaves)
        data = memoryview(chunk)
        for number, first, last in leaf_spans(begin, end, self.stored.tensors[name].num_bytes):
            if not table.has_leaf(name, number, data[first - begin : last - begin]):
                raise PeerError(
                    f"sent wrong bytes {first} to {last} of {shown_name(name)}: they were damaged "
                    "on the way, or its file is"
                )
