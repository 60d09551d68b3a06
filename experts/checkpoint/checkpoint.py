"""Reading a Hugging Face safetensors folder: configuration, headers, and single tensors.

Opening a checkpoint reads ``config.json``, the index and the shards' headers, never a weight, and
checks every tensor's name, shape and dtype against the model family, so that a damaged or unknown
checkpoint is refused before any process is started for it. Pickle formats are refused unread.
"""

from __future__ import annotations

import importlib.resources
import os
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
    stamp_of,
    usual_config,
    wrong_kinds,
)
from experts.checkpoint.quantization import Packed, check_dtypes, packed_tensors, quantization_of
from experts.checkpoint.shards import DTYPES, TensorInfo, read_headers
from experts.families.base import Config, ExpertShape, Family, Shapes

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
_HUB_FOLDERS = ["*/*"]
"""What is left there: the same weights in other layouts, as GPT-OSS has them."""


class RemoteFiles(Protocol):
    """A checkpoint's files on another node; see :mod:`experts.checkpoint.remote_files`."""

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return bytes of a tensor, by default all; raises :class:`CheckpointError` if nobody has
        them."""
        ...

    def release(self) -> None:
        """Keep nobody busy until the next tensor is asked for."""
        ...

    def told(self) -> str:
        """Return what has been fetched so far, for people."""
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
        """Seconds that they took."""
        ...

    @property
    def small_files(self) -> Mapping[str, bytes]:
        """The configuration's and the tokenizer's files by name."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened and checked checkpoint; holds headers only.

    ``config`` has the usual key names, whatever the family calls them. ``tensors`` are as they are
    stored, ``packed`` tells of those of the model that are quantised; ``dtype`` is that of the
    others. ``remote`` has the files where they are not on this node; ``folder`` is then the other
    node's. Else ``stamps`` tell whether a file is still the one that was opened.
    """

    folder: Path
    config: Config
    family: Family
    shape: ExpertShape
    tensors: dict[str, TensorInfo]
    dtype: str
    remote: RemoteFiles | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def max_position_embeddings(self) -> int:
        """The longest context, in tokens, that the model was made for."""
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    @property
    def stored(self) -> str | None:
        """How weights are quantised in the files, if any are."""
        return next((packed.method for packed in self.packed.values()), None)

    def small_file(self, name: str) -> bytes | None:
        """Return a file beside the weights, or ``None`` where there is none.

        Raises :class:`CheckpointError` when it cannot be read.
        """
        if self.remote is not None:
            return self.remote.small_files.get(name)
        file = self.folder / name
        return read_small(file) if file.is_file() else None

    def expert_bytes(self, dtype: str) -> int:
        """Return the bytes of one expert's weights when they are held in ``dtype``.

        Quantised ones are not held as they are stored.
        """
        return self.shape.expert_parameters * DTYPE_BYTES[dtype]


def resolve_folder(path: str) -> Path:
    """Find a model's folder on this machine.

    An absolute path is taken as it is; a relative one is looked up in the installed ``deploy``
    package; anything else that looks like ``owner/name`` is a hub id, fetched into the hub's local
    cache. Raises :class:`CheckpointMissingError` when there is no such folder.
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
        reason = f"{type(error).__name__}"
        raise CheckpointMissingError(
            f"is no folder of the deploy package and could not be fetched from the hub ({reason})",
            hub_id,
        ) from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's configuration and headers.

    Raises :class:`CheckpointError` whose field is the file: no or broken ``config.json``, an
    unknown architecture, a missing or truncated shard, pickle weights, and tensors that are
    missing, unexpected, or of another shape or dtype than the configuration says; also those that
    are quantised in a way that is not known.
    """
    config = read_json(folder / "config.json")
    opened = checkpoint_of(folder, config, lambda: read_headers(folder, read_json))
    files = sorted({info.file for info in opened.tensors.values()})
    return replace(opened, stamps={file: stamp_of((folder / file).stat()) for file in files})


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
    tensors = {n: info for n, info in read_tensors().items() if not n.startswith(ignored or (" ",))}
    expected = _expected(folder, family, config, shape, len(tensors))
    packed = packed_tensors(quantization_of(config, config_file), expected, tensors, folder)
    _check_tensors(folder, config, _stored(expected, packed), tensors)
    dtype = _plain_dtype(folder, family, tensors, packed)
    return Checkpoint(folder, config, family, shape, tensors, dtype, remote, packed)


def read_range(checkpoint: Checkpoint, name: str, begin: int, end: int) -> bytes:
    """Read bytes ``begin`` to ``end`` of a tensor of a checkpoint in a folder of this node.

    Raises as :func:`read_into` does, and :class:`CheckpointError` for a tensor or a range that it
    does not have.
    """
    info = checkpoint.tensors.get(name)
    if info is None or not 0 <= begin <= end <= info.end - info.begin:
        raise CheckpointError(f"has no bytes {begin} to {end} of {name}", str(checkpoint.folder))
    data = bytearray(end - begin)
    read_into(checkpoint, name, begin, memoryview(data))
    return bytes(data)


def read_into(checkpoint: Checkpoint, name: str, begin: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with a tensor's bytes from ``begin`` on: read once, and kept nowhere else.

    Raises :class:`CheckpointError` when the file cannot be read, or is not the one any more whose
    header was read.
    """
    info = checkpoint.tensors[name]
    file = checkpoint.folder / info.file
    try:
        with file.open("rb", buffering=0) as opened:
            if stamp_of(os.fstat(opened.fileno())) != checkpoint.stamps.get(info.file):
                raise CheckpointError(
                    f"tensor {name} cannot be read: the file has changed since it was opened",
                    str(file),
                )
            opened.seek(info.begin + begin)
            done = 0
            while done < len(buffer):
                count = opened.readinto(buffer[done:])
                if not count:
                    raise CheckpointError("has become shorter", str(file))
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(file)) from None


def _expected(
    folder: Path, family: Family, config: Config, shape: ExpertShape, num_tensors: int
) -> Shapes:
    """Return the model's tensors; raises :class:`CheckpointError` if there are far too few."""
    with wrong_kinds(folder / "config.json"):
        expected = family.dense_tensors(config)
    names = len(shape.layers) * (1 if family.stacks_experts else shape.num_experts)
    if names > num_tensors:  # before that many names are made
        raise CheckpointError(
            f"lacks tensors: config.json says {shape.num_experts} experts in each of "
            f"{len(shape.layers)} layers, the files hold {num_tensors} tensors",
            str(folder),
        )
    with wrong_kinds(folder / "config.json"):
        return expected | {part.name: part.shape for part in family.expert_parts(config, shape)}


def _stored(expected: Shapes, packed: Mapping[str, Packed]) -> Shapes:
    """Return the tensors that must be there: of quantised ones codes and scales."""
    stored = {name: shape for name, shape in expected.items() if name not in packed}
    for one in packed.values():
        stored |= one.stored()
    return stored


def _check_tensors(
    folder: Path, config: Config, expected: Shapes, tensors: dict[str, TensorInfo]
) -> None:
    ignored = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - ignored)
    for what, names_ in (("lacks", missing), ("has unexpected", unexpected)):
        if names_:
            listed = ", ".join(map(shown_name, names_[:3])) + (", …" if len(names_) > 3 else "")
            raise CheckpointError(f"{what} {len(names_)} tensors: {listed}", str(folder))
    for name, wanted in expected.items():
        info = tensors[name]
        if info.shape != wanted:
            raise CheckpointError(
                f"tensor {name} has shape {list(info.shape)}; config.json says {list(wanted)}",
                str(folder / info.file),
            )


def _plain_dtype(
    folder: Path,
    family: Family,
    tensors: dict[str, TensorInfo],
    packed: Mapping[str, Packed],
) -> str:
    """Return the dtype of all tensors that are not quantised."""
    for one in packed.values():
        check_dtypes(one, tensors, folder)
    of_packed = {name for one in packed.values() for name in (one.codes, one.scales)}
    kinds = set()
    for name, info in tensors.items():
        if name in of_packed:
            continue
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {shown_name(name)} has dtype {info.dtype}, and config.json's "
                f"quantization_config names none with such codes; supported: {', '.join(DTYPES)}",
                str(folder / info.file),
            )
        if info.dtype != "F32" or not name.endswith(family.in_float32 or (" ",)):
            kinds.add(info.dtype)
    if len(kinds) > 1:
        raise CheckpointError(f"mixes the dtypes {', '.join(sorted(kinds))}", str(folder))
    return DTYPES[kinds.pop()]
