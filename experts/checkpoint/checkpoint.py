"""Reading a Hugging Face safetensors folder: configuration, headers, and single tensors.

Opening a checkpoint reads ``config.json``, the index and the shards' headers, and no weight. It
checks every tensor's name, shape and dtype against the model family, so that a damaged or unknown
checkpoint is refused before any process starts. Pickle files are refused unread. Bytes of tensors
are verified as they are read, where the checkpoint has a table of hashes.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from cluster.errors import CheckpointError, CheckpointMissingError, shown_name
from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.config import (
    checked_shape,
    family_of,
    read_json,
    read_small,
    usual_config,
    wrong_kinds,
)
from experts.checkpoint.hashes import HashTable, leaf_spans
from experts.checkpoint.quantization import Packed, check_dtypes, packed_tensors, quantization_of
from experts.checkpoint.shard_file import ShardFile, Stamp, stamp_of_file
from experts.checkpoint.shards import DTYPES, TensorInfo, listed_names, read_headers
from experts.families.base import Config, ExpertShape, Family, Shapes

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
_HUB_FOLDERS = ["*/*"]
"""Folders that are not fetched: the same weights in other layouts, as in GPT-OSS."""


class RemoteFiles(Protocol):
    """A checkpoint's files on another node; see :mod:`experts.checkpoint.remote_files`."""

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
class Checkpoint:
    """An opened and checked checkpoint, with headers only.

    ``config`` has the usual key names of all families. ``tensors`` are the stored tensors;
    ``packed`` has the model's quantised tensors, and ``dtype`` is that of all others. Where the
    files are on another node, ``remote`` reads them and ``folder`` is a path of that node.
    Otherwise ``stamps`` detect a file that has changed since the checkpoint was opened, and every
    byte that is read is verified by ``hashes``, if there are any.
    """

    folder: Path
    config: Config
    family: Family
    shape: ExpertShape
    tensors: dict[str, TensorInfo]
    dtype: str
    remote: RemoteFiles | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    hashes: HashTable | None = None

    @property
    def num_bytes(self) -> int:
        """The stored bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def max_position_embeddings(self) -> int:
        """The model's longest context in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    @property
    def stored(self) -> str | None:
        """The method of the quantised weights in the files, if there are any."""
        return next((packed.method for packed in self.packed.values()), None)

    def small_file(self, name: str) -> bytes | None:
        """Return a file beside the weights, or ``None`` without such a file.

        Raises :class:`CheckpointError` when it cannot be read.
        """
        if self.remote is not None:
            return self.remote.small_files.get(name)
        file = self.folder / name
        return read_small(file) if file.is_file() else None

    def expert_bytes(self, dtype: str) -> int:
        """Return the bytes of one expert's weights in ``dtype``, also of quantised weights."""
        return self.shape.expert_parameters * DTYPE_BYTES[dtype]


def resolve_folder(path: str) -> Path:
    """Find a model's folder on this machine.

    ``path`` is an absolute path, or a path in the installed ``deploy`` package, or a hub id
    ``owner/name``, which is fetched into the hub's local cache. Raises
    :class:`CheckpointMissingError` when there is no such folder.
    """
    if Path(path).is_absolute():
        if Path(path).is_dir():
            return Path(path)
        raise CheckpointMissingError("no such folder", path)
    bundled = Path(str(importlib.resources.files("deploy"))) / path
    if bundled.is_dir():
        return bundled
    if _HUB_ID.match(path):
        return _fetch_from_hub(path)
    raise CheckpointMissingError(
        "is neither an absolute folder, nor a folder in the deploy package, nor a hub id", path
    )


def _fetch_from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import and seldom needed

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FOLDERS)
        )
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointMissingError(
            "is no folder of the deploy package and could not be fetched from the hub "
            f"({type(error).__name__})",
            hub_id,
        ) from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's configuration and headers.

    Raises :class:`CheckpointError`, whose field is the file, for a missing or broken
    ``config.json``, an unknown architecture, a missing or truncated shard, pickle weights, an
    unknown quantisation, and tensors that are missing, unexpected, or of another shape or dtype
    than the configuration says.
    """
    config = read_json(folder / "config.json")
    shards = [file for file in folder.glob("*.safetensors") if file.is_file()]
    before = {file.name: stamp_of_file(file) for file in shards}
    opened = checkpoint_of(folder, config, lambda: read_headers(folder, read_json))
    files = sorted({info.file for info in opened.tensors.values()})
    stamps = {file: stamp_of_file(folder / file) for file in files}
    for file, stamp in stamps.items():
        if stamp != before.get(file):
            raise CheckpointError("has changed while it was opened", str(folder / file))
    return replace(opened, stamps=stamps)


def checkpoint_of(
    folder: Path,
    config: Config,
    read_tensors: Callable[[], dict[str, TensorInfo]],
    remote: RemoteFiles | None = None,
) -> Checkpoint:
    """Check a configuration, then the headers beside it; see :func:`open_checkpoint`."""
    config_file = folder / "config.json"
    family = family_of(config, config_file)
    config = usual_config(family, config, config_file)
    shape = checked_shape(family, config, config_file)
    with wrong_kinds(config_file):
        ignored = family.ignored(config)
    tensors = {name: info for name, info in read_tensors().items() if not name.startswith(ignored)}
    expected = _expected(folder, family, config, shape, len(tensors))
    packed = packed_tensors(quantization_of(config, config_file), expected, tensors, folder)
    _check_tensors(folder, config, _stored(expected, packed), tensors)
    dtype = _plain_dtype(folder, family, tensors, packed)
    return Checkpoint(folder, config, family, shape, tensors, dtype, remote, packed)


def read_range(checkpoint: Checkpoint, name: str, begin: int, end: int) -> bytes:
    """Read bytes ``begin`` to ``end`` of a tensor of a checkpoint in a folder of this node.

    Raises :class:`CheckpointError` as :func:`read_into` does, and for a missing tensor or range.
    """
    info = checkpoint.tensors.get(name)
    if info is None or not 0 <= begin <= end <= info.num_bytes:
        raise CheckpointError(f"has no bytes {begin} to {end} of {name}", str(checkpoint.folder))
    data = bytearray(end - begin)
    read_into(checkpoint, name, begin, memoryview(data))
    return bytes(data)


def read_into(checkpoint: Checkpoint, name: str, begin: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with a tensor's bytes from ``begin`` on.

    With a table of hashes every byte is verified after it was read, and leaves that lie across an
    end of the range are read whole. Raises :class:`CheckpointError`, which names file and tensor,
    for bytes that differ from the table. Without a table, it is raised for a file that has changed
    since the checkpoint was opened. ``buffer`` must not be used after an error.
    """
    info = checkpoint.tensors[name]
    try:
        with ShardFile(checkpoint.folder / info.file) as file:
            if checkpoint.hashes is not None:
                _read_verified(file, checkpoint.hashes, name, info, begin, buffer)
                return
            if file.stamp != checkpoint.stamps.get(info.file):
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
                f"({table.identity}): the file is damaged or has changed since it was opened",
                str(file.path),
            )
        if not is_whole:
            part[:] = leaf[first - leaf_begin : last - leaf_begin]


def _expected(
    folder: Path, family: Family, config: Config, shape: ExpertShape, num_tensors: int
) -> Shapes:
    """Return the model's tensors; raises :class:`CheckpointError` if the files have far too few."""
    with wrong_kinds(folder / "config.json"):
        expected = family.dense_tensors(config)
    names = len(shape.layers) * (1 if family.stacks_experts else shape.num_experts)
    if names > num_tensors:  # checked first: making the names takes memory
        raise CheckpointError(
            f"lacks tensors: config.json says {shape.num_experts} experts in each of "
            f"{len(shape.layers)} layers, the files hold {num_tensors} tensors",
            str(folder),
        )
    with wrong_kinds(folder / "config.json"):
        return expected | {part.name: part.shape for part in family.expert_parts(config, shape)}


def _stored(expected: Shapes, packed: Mapping[str, Packed]) -> Shapes:
    """Return the expected stored tensors: codes and scales in place of quantised tensors."""
    stored = {name: shape for name, shape in expected.items() if name not in packed}
    for tensor in packed.values():
        stored |= tensor.stored()
    return stored


def _check_tensors(
    folder: Path, config: Config, expected: Shapes, tensors: dict[str, TensorInfo]
) -> None:
    ignored = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - ignored)
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise CheckpointError(
                f"{problem} {len(names)} tensors: {listed_names(names)}", str(folder)
            )
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(info.shape)}; config.json says {list(shape)}",
                str(folder / info.file),
            )


def _plain_dtype(
    folder: Path,
    family: Family,
    tensors: dict[str, TensorInfo],
    packed: Mapping[str, Packed],
) -> str:
    """Return the one dtype of all tensors that are not quantised."""
    for tensor in packed.values():
        check_dtypes(tensor, tensors, folder)
    stored = {name for tensor in packed.values() for name in (tensor.codes, tensor.scales)}
    dtypes = set()
    for name, info in tensors.items():
        if name in stored:
            continue
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {shown_name(name)} has dtype {info.dtype}, and the quantization_config of "
                f"config.json names no method with such codes; supported: {', '.join(DTYPES)}",
                str(folder / info.file),
            )
        if info.dtype != "F32" or not name.endswith(family.in_float32):
            dtypes.add(info.dtype)
    if len(dtypes) > 1:
        raise CheckpointError(f"mixes the dtypes {', '.join(sorted(dtypes))}", str(folder))
    return DTYPES[dtypes.pop()]
