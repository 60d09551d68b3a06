"""The safetensors files of a checkpoint, and their headers.

Only the safetensors library parses headers. It checks that tensors neither overlap nor leave holes
nor exceed the file, so a tensor begins at the end of the tensor before. The length of a header is
checked first, because a parsed header takes about ten times its length in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, shown, shown_name

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of weights that are not quantised."""
STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
"""Bytes of one number of each dtype, also of codes of quantised weights."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20
"""The longest header of one file: about 120,000 tensors."""
MAX_HEADERS_BYTES = 64 << 20
"""The most bytes of all headers of a checkpoint."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_LISTED = 3
_LENGTH_BYTES = 8
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,199}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its shape, its dtype, and its bytes, counted from the file's start."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The stored bytes of the tensor."""
        return self.end - self.begin


def read_headers(
    folder: Path, read_index: Callable[[Path], Mapping[str, Any]]
) -> dict[str, TensorInfo]:
    """Return the tensors of a folder's shards; ``read_index`` reads the index, a JSON object.

    Raises :class:`CheckpointError`, whose field is the file, for a missing, broken or truncated
    shard, headers that are too long, a tensor in two shards, a dtype that is not served, and an
    index that contradicts the shards or has anything but plain file names.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / WEIGHTS_FILE).exists():
            raise CheckpointError(_no_weights(folder), str(folder))
        return read_header(folder / WEIGHTS_FILE)
    weight_map = weight_map_of(read_index(folder / INDEX_FILE), folder / INDEX_FILE)
    tensors = read_all(folder / file for file in sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"tensor {shown_name(name)} is not in {file} as the index says",
                str(folder / file),
            )
    return tensors


def weight_map_of(index: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return an index's mapping from tensors to shards, which are plain names of files beside it.

    Raises :class:`CheckpointError` naming ``file``.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("needs a mapping 'weight_map'", str(file))
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"names the shard {shown(shard)}; only plain .safetensors file names are allowed",
                str(file),
            )
    return weight_map


def read_all(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of several files; raises as :func:`read_headers` does."""
    tensors: dict[str, TensorInfo] = {}
    left_bytes = MAX_HEADERS_BYTES
    for file in files:
        left_bytes -= _checked_header_bytes(file, left_bytes)
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {shown_name(name)} is also in {tensors[name].file}", str(file)
                )
            tensors[name] = info
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file; raises as :func:`read_headers` does."""
    begin = _LENGTH_BYTES + _checked_header_bytes(path, MAX_HEADER_BYTES)
    tensors = {}
    try:
        with safe_open(str(path), framework="numpy") as shard:  # checks the whole header
            for name in shard.offset_keys():
                part = shard.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if dtype not in STORED_BYTES:
                    raise CheckpointError(
                        f"tensor {shown_name(name)} has dtype {dtype}; "
                        f"supported: {', '.join(DTYPES)}",
                        str(path),
                    )
                end = begin + prod(shape) * STORED_BYTES[dtype]
                tensors[name] = TensorInfo(path.name, shape, dtype, begin, end)
                begin = end
    except (SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from None
    return tensors


def _checked_header_bytes(path: Path, max_bytes: int) -> int:
    """Return the length of a file's header, which is not read.

    Raises :class:`CheckpointError` when there is no such file, or when the length exceeds
    ``max_bytes`` or :data:`MAX_HEADER_BYTES`.
    """
    try:
        if not path.is_file():
            raise CheckpointError("the shard is missing", str(path))
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(path)) from None
    header_bytes = int.from_bytes(start, "little")
    if len(start) < _LENGTH_BYTES:
        raise _broken(path, "it is too short")
    if header_bytes > min(max_bytes, MAX_HEADER_BYTES):
        raise _broken(
            path,
            f"its header has {header_bytes} bytes; at most {MAX_HEADER_BYTES}, and "
            f"{MAX_HEADERS_BYTES} in all files",
        )
    return header_bytes


def _broken(path: Path, reason: str) -> CheckpointError:
    # The library's message may contain the name of a tensor, with any characters.
    plain = "".join(char if char.isprintable() else "?" for char in reason[:300])
    return CheckpointError(f"is not a complete safetensors file ({plain})", str(path))


def listed_names(names: Sequence[str]) -> str:
    """Return the first :data:`MAX_LISTED` names for an error, and ``…`` for all others."""
    ending = ", …" if len(names) > MAX_LISTED else ""
    return ", ".join(map(shown_name, names[:MAX_LISTED])) + ending


def _no_weights(folder: Path) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"has only pickle weights ({listed_names(pickles)}), which are never "
            "loaded; convert them to safetensors"
        )
    return f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
