"""The Ray actor that reads a checkpoint on its node for another node.

A process without a checkpoint starts a reader on each node that may have it, fetches bytes from one
of them, and ends it (:mod:`experts.checkpoint.remote_files`). A reader reads one checkpoint: its
tensors, by the names in the headers, and the small files beside them. It does not import torch, so
that it starts quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import CheckpointError, ExpertMeshError
from experts.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_range, resolve_folder
from experts.checkpoint.config import read_small
from experts.checkpoint.identity import identity_of

SMALL_FILES = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
"""The files from which transformers reads a configuration and a tokenizer."""
MAX_SMALL_FILES_BYTES = 256 << 20
"""The most bytes of all small files, which travel together."""
MAX_CHUNK_BYTES = 16 << 20


class Chunk(NamedTuple):
    """Bytes, and the SHA-256 that the reader computed of them."""

    data: bytes
    sha256: bytes

    @classmethod
    def of(cls, data: bytes) -> Chunk:
        """Hash ``data``."""
        return cls(data, hashlib.sha256(data).digest())

    def is_whole(self) -> bool:
        """Return whether the bytes have the reader's hash."""
        return hashlib.sha256(self.data).digest() == self.sha256


class CheckpointReader:
    """Reads one checkpoint of its node; every call returns a dictionary.

    The dictionary of an error is ``{"error": …}``, as between all processes of a deployment.
    """

    def __init__(self, path: str) -> None:
        """``path`` is the configured path, which :meth:`open` opens."""
        self._path = path
        self._checkpoint: Checkpoint | None = None

    def open(self) -> dict[str, Any]:
        """Open the checkpoint; returns its identity, headers and small files."""
        try:
            checkpoint = open_checkpoint(resolve_folder(self._path))
            self._checkpoint = checkpoint
            return {
                "identity": identity_of(checkpoint),
                "folder": str(checkpoint.folder),
                "tensors": {name: astuple(info) for name, info in checkpoint.tensors.items()},
                "small_files": {name: Chunk.of(data) for name, data in _small(checkpoint).items()},
            }
        except ExpertMeshError as error:
            return {"error": error.to_wire()}

    def read(self, name: str, begin: int, end: int) -> dict[str, Any]:
        """Return bytes ``begin`` to ``end`` of a tensor, at most :data:`MAX_CHUNK_BYTES`."""
        try:
            if self._checkpoint is None:
                raise CheckpointError("is not open", self._path)
            if end - begin > MAX_CHUNK_BYTES:
                raise CheckpointError(f"at most {MAX_CHUNK_BYTES} bytes at once", name)
            return {"chunk": Chunk.of(read_range(self._checkpoint, name, begin, end))}
        except ExpertMeshError as error:
            return {"error": error.to_wire()}


def _small(checkpoint: Checkpoint) -> dict[str, bytes]:
    found = {file for pattern in SMALL_FILES for file in checkpoint.folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    size_bytes = sum(file.stat().st_size for file in files)
    if size_bytes > MAX_SMALL_FILES_BYTES:
        raise CheckpointError(
            f"has {size_bytes} bytes beside the weights ({', '.join(SMALL_FILES)}); at most "
            f"{MAX_SMALL_FILES_BYTES}",
            str(checkpoint.folder),
        )
    return {file.name: read_small(file) for file in files}


class RayNeighbours:
    """The other living nodes of this process's cluster; none where Ray does not run."""

    def nodes(self) -> Sequence[str]:
        """See :class:`experts.checkpoint.remote_files.Neighbours`."""
        if not ray.is_initialized():
            return []
        own = ray.get_runtime_context().get_node_id()
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != own]

    def connect(self, node: str, path: str) -> RayPeer:
        """See :class:`experts.checkpoint.remote_files.Neighbours`."""
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
        """See :class:`experts.checkpoint.remote_files.Peer`."""
        return self._reader.open.remote().future()  # type: ignore[no-any-return]

    def read(self, name: str, begin: int, end: int) -> Future[dict[str, Any]]:
        """See :class:`experts.checkpoint.remote_files.Peer`."""
        return self._reader.read.remote(name, begin, end).future()  # type: ignore[no-any-return]
