"""The Ray actor that reads a checkpoint on its node for another node.

A process without a checkpoint starts a reader on each node that may have it, fetches bytes from one
of them, and ends it (:mod:`experts.checkpoint.remote.remote_files`). A reader reads one checkpoint:
its hashes, its tensors, by the names in the headers, and the small files beside them. It does not
verify its bytes, since the receiver does. It does not import torch, so that it starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import astuple
from typing import Any, NamedTuple

import ray
from blake3 import blake3
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import CheckpointError, ExpertMeshError
from experts.checkpoint.folder import open_folder
from experts.checkpoint.hashes import HashTable, tensor_hash
from experts.checkpoint.identity import hash_table_of
from experts.checkpoint.small_files import small_files_of
from experts.checkpoint.stored import Stored, read_range, resolve_folder

MAX_CHUNK_BYTES = 16 << 20
"""The most bytes of tensors, or of leaves, in one answer."""
HASHING_ANSWER_S = 2.0
"""How long :meth:`CheckpointReader.open` waits for hashes before it tells how far they are."""


class SmallFile(NamedTuple):
    """A file beside the weights, and its BLAKE3 hash, by which a damaged transfer is noticed."""

    data: bytes
    hash: bytes

    @classmethod
    def of(cls, data: bytes) -> SmallFile:
        """Hash ``data``."""
        return cls(data, blake3(data).digest())

    def is_whole(self) -> bool:
        """Return whether the bytes have the reader's hash."""
        return blake3(self.data).digest() == self.hash


class CheckpointReader:
    """Reads one checkpoint of its node; every call returns a dictionary.

    The dictionary of an error is ``{"error": …}``, as between all processes of a deployment.
    """

    def __init__(self, path: str) -> None:
        """``path`` is the configured path, which :meth:`open` opens."""
        self._path = path
        self._checkpoint: Stored | None = None
        self._hashed_bytes = 0
        self._hashing: Future[HashTable] | None = None

    def open(self) -> dict[str, Any]:
        """Open the checkpoint; returns its headers, small files and tensors' hashes.

        Where the node keeps no hashes of it, they are computed. The answers meanwhile are
        ``{"hashed_bytes": …}``, one every :data:`HASHING_ANSWER_S`; the caller calls again.
        """
        try:
            if self._checkpoint is None:
                self._checkpoint = open_folder(resolve_folder(self._path))
            checkpoint = self._checkpoint
            table = self._table(checkpoint)
            if table is None:
                return {"hashed_bytes": self._hashed_bytes}
            files = small_files_of(checkpoint)
            return {
                "folder": str(checkpoint.folder),
                "tensors": {name: astuple(info) for name, info in checkpoint.tensors.items()},
                "small_files": {name: SmallFile.of(data) for name, data in files.items()},
                "hashes": _hashes(checkpoint, table),
            }
        except ExpertMeshError as error:
            return {"error": error.to_wire()}

    def leaves(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the leaves of tensors, together at most :data:`MAX_CHUNK_BYTES`."""
        try:
            table = None if self._hashing is None else self._table(self._opened())
            if table is None:
                raise CheckpointError("is not open", self._path)
            unknown = next((name for name in names if name not in table.leaves), None)
            if unknown is not None:
                raise CheckpointError(f"has no tensor {unknown}", self._path)
            leaves = [table.leaves[name] for name in names]
            if sum(map(len, leaves)) > MAX_CHUNK_BYTES:
                raise CheckpointError(f"at most {MAX_CHUNK_BYTES} bytes at once", self._path)
            return {"leaves": leaves}
        except ExpertMeshError as error:
            return {"error": error.to_wire()}

    def read(self, name: str, begin: int, end: int) -> dict[str, Any]:
        """Return bytes ``begin`` to ``end`` of a tensor, at most :data:`MAX_CHUNK_BYTES`."""
        try:
            if end - begin > MAX_CHUNK_BYTES:
                raise CheckpointError(f"at most {MAX_CHUNK_BYTES} bytes at once", name)
            return {"chunk": read_range(self._opened(), name, begin, end)}
        except ExpertMeshError as error:
            return {"error": error.to_wire()}

    def _opened(self) -> Stored:
        if self._checkpoint is None:
            raise CheckpointError("is not open", self._path)
        return self._checkpoint

    def _table(self, checkpoint: Stored) -> HashTable | None:
        """Return the hashes, or ``None`` while they are computed.

        Raises :class:`CheckpointError` when a file cannot be read; the next call tries again.
        """
        if self._hashing is None:
            pool = ThreadPoolExecutor(1, "hashing")
            self._hashing = pool.submit(hash_table_of, checkpoint, self._watch)
            pool.shutdown(wait=False)
        try:
            return self._hashing.result(HASHING_ANSWER_S)
        except FutureTimeoutError:
            return None
        except CheckpointError:
            self._checkpoint = self._hashing = None
            raise

    def _watch(self, done_bytes: int, all_bytes: int) -> None:
        self._hashed_bytes = done_bytes


def _hashes(checkpoint: Stored, table: HashTable) -> Mapping[str, bytes]:
    tensors = checkpoint.tensors
    return {name: tensor_hash(name, info, table.leaves[name]) for name, info in tensors.items()}


class RayNeighbours:
    """The other living nodes of this process's cluster; none where Ray does not run."""

    def nodes(self) -> Sequence[str]:
        """See :class:`experts.checkpoint.remote.remote_files.Neighbours`."""
        if not ray.is_initialized():
            return []
        own = ray.get_runtime_context().get_node_id()
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != own]

    def connect(self, node: str, path: str) -> RayPeer:
        """See :class:`experts.checkpoint.remote.remote_files.Neighbours`."""
        return RayPeer(node, path)


class RayPeer:
    """A reader on another node; Ray ends its process when this object is dropped."""

    def __init__(self, node: str, path: str) -> None:
        """Start the reader; returns at once."""
        self.node = node
        self._reader = (
            ray.remote(CheckpointReader)
            .options(
                num_cpus=0,
                enable_task_events=False,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(path)
        )

    def open(self) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote.remote_files.Peer`."""
        return self._reader.open.remote().future()  # type: ignore[no-any-return]

    def leaves(self, names: Sequence[str]) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote.remote_files.Peer`."""
        return self._reader.leaves.remote(names).future()  # type: ignore[no-any-return]

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote.remote_files.Peer`."""
        return self._reader.read.remote(name, begin, end).future()  # type: ignore[no-any-return]
