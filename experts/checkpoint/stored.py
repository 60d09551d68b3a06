"""The stored bytes of a model: its tensors in the files of a folder, of this node or of another.

A checkpoint's tensors are those of its safetensors files. A mixture's are its files as a whole.
Bytes are verified as they are read, where there is a table of hashes.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cluster.errors import CheckpointError, CheckpointMissingError, shown_name
from experts.checkpoint.config import read_small
from experts.checkpoint.hashes import HashTable, leaf_spans
from experts.checkpoint.hub import (
    FILES,
    HubId,
    cached_id,
    fetch,
    parse_hub_id,
    why_not_fetched,
)
from experts.checkpoint.shard_file import ShardFile, Stamp
from experts.checkpoint.shards import TensorInfo
from experts.families.base import Config


class RemoteFiles(Protocol):
    """A checkpoint's files on another node; see :mod:`experts.checkpoint.remote.remote_files`."""

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes of a tensor, by default all.

        Raises :class:`CheckpointError` when no node has them.
        """
        ...

    def release(self) -> None:
        """End the process on the other node until the next :meth:`tensor`."""
        ...

    def summary(self) -> str:
        """Return the fetched bytes and seconds so far as text."""
        ...

    @property
    def identity(self) -> str:
        """The checkpoint's identity; see :mod:`experts.checkpoint.identity`."""
        ...

    @property
    def fetched_bytes(self) -> int:
        """Bytes of tensors that have come from other nodes."""
        ...

    @property
    def fetched_s(self) -> float:
        """Seconds of these fetches."""
        ...

    @property
    def small_files(self) -> Mapping[str, bytes]:
        """The files of the configuration and of the tokenizer by name."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """An opened folder, with headers only.

    ``config`` is the configuration under the hashes. Where the files are on another node,
    ``remote`` reads them and ``folder`` is a path of that node. Otherwise ``stamps`` detect a file
    that has changed since the folder was opened, and every byte that is read is verified by
    ``hashes``, if there are any.
    """

    folder: Path
    config: Config
    tensors: dict[str, TensorInfo]
    remote: RemoteFiles | None = field(default=None, kw_only=True)
    stamps: Mapping[str, Stamp] = field(default_factory=dict, kw_only=True)
    hashes: HashTable | None = field(default=None, kw_only=True)

    @property
    def num_bytes(self) -> int:
        """The stored bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def small_file(self, name: str) -> bytes | None:
        """Return a file beside the weights, or ``None`` without such a file.

        Raises :class:`CheckpointError` when it cannot be read.
        """
        if self.remote is not None:
            return self.remote.small_files.get(name)
        file = self.folder / name
        return read_small(file) if file.is_file() else None


def resolve_folder(path: str) -> Path:
    """Find a model's folder on this machine.

    ``path`` is an absolute path, or a path in the installed ``deploy`` package, or a hub id
    ``owner/name`` or ``owner/name@revision``, which is fetched into the hub's local cache. An
    absolute path is never a hub id, and a folder of the package goes before one, with an @ too.
    Raises :class:`CheckpointMissingError` when there is no such folder.
    """
    if Path(path).is_absolute():
        if Path(path).is_dir():
            return Path(path)
        raise CheckpointMissingError("no such folder", path)
    bundled = Path(str(importlib.resources.files("deploy"))) / path
    if bundled.is_dir():
        return bundled
    try:
        hub_id = parse_hub_id(path)
    except ValueError as error:
        raise CheckpointMissingError(f"{error}, and there is no such folder", path) from None
    if hub_id is None:
        raise CheckpointMissingError(
            "is no folder, neither an absolute one nor one beside the deployment file or in the "
            "deploy package, and no hub id",
            path,
        )
    return fetched(hub_id)


def pinned_path(path: str, stored: Stored) -> str:
    """Return the path by which every process finds what was opened at ``path`` on this machine.

    A hub id gets the commit that it was resolved to: a branch that moves afterwards gives no
    process another model. Any other path is returned as it is.
    """
    if Path(path).is_absolute() or stored.remote is not None:
        return path
    cached = cached_id(stored.folder)
    return path if cached is None else str(cached)


def fetched(hub_id: HubId, patterns: Sequence[str] = FILES) -> Path:
    """Return the folder of a model of the hub, with the files of these patterns.

    Raises :class:`CheckpointMissingError`, which says why it was not fetched.
    """
    try:
        return fetch(hub_id, patterns)
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointMissingError(
            "is no folder beside the deployment file or in the deploy package, and was not fetched "
            f"from the hub: {why_not_fetched(error)}",
            str(hub_id),
        ) from None


def read_range(stored: Stored, name: str, begin: int, end: int) -> bytes:
    """Read bytes ``begin`` to ``end`` of a tensor in a folder of this node.

    Raises :class:`CheckpointError` as :func:`read_into` does, and for a missing tensor or range.
    """
    info = stored.tensors.get(name)
    if info is None or not 0 <= begin <= end <= info.num_bytes:
        raise CheckpointError(f"has no bytes {begin} to {end} of {name}", str(stored.folder))
    data = bytearray(end - begin)
    read_into(stored, name, begin, memoryview(data))
    return bytes(data)


def read_into(stored: Stored, name: str, begin: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with a tensor's bytes from ``begin`` on.

    With a table of hashes every byte is verified after it was read, and leaves that lie across an
    end of the range are read whole. Raises :class:`CheckpointError`, which names file and tensor,
    for bytes that differ from the table. Without a table, it is raised for a file that has changed
    since the checkpoint was opened. ``buffer`` must not be used after an error.
    """
    info = stored.tensors[name]
    try:
        with ShardFile(stored.folder / info.file) as file:
            if stored.hashes is not None:
                _read_verified(file, stored.hashes, name, info, begin, buffer)
                return
            if file.stamp != stored.stamps.get(info.file):
                raise CheckpointError("the file has changed since it was opened", str(file.path))
            file.read(info.begin + begin, buffer)
    except CheckpointError as error:
        message = f"tensor {shown_name(name)}: {error.message}"
        raise CheckpointError(message, error.field) from None


def _read_verified(
    file: ShardFile, table: HashTable, name: str, info: TensorInfo, begin: int, buffer: memoryview
) -> None:
    end = begin + len(buffer)
    for number, leaf_begin, leaf_end in leaf_spans(begin, end, info.num_bytes):
        first, last = max(begin, leaf_begin), min(end, leaf_end)
        part = buffer[first - begin : last - begin]
        is_whole = last - first == leaf_end - leaf_begin
        leaf = part if is_whole else memoryview(bytearray(leaf_end - leaf_begin))
        file.read(info.begin + leaf_begin, leaf)  # hashed at once, from the processor's cache
        if not table.has_leaf(name, number, leaf):
            raise CheckpointError(
                f"bytes {leaf_begin} to {leaf_end} differ from the checkpoint that is served "
                f"({table.identity}): the file is corrupt or has changed since it was opened",
                str(file.path),
            )
        if not is_whole:
            part[:] = leaf[first - leaf_begin : last - leaf_begin]
