"""The headers of a checkpoint's safetensors files, and which files those are.

Headers are parsed by the safetensors library alone, which checks that tensors neither overlap nor
leave holes nor reach beyond the file; so a tensor begins where those before it end. Before it sees
a file its header's length is checked: memory is about ten times that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, shown, shown_name

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What weights that are not quantised may be."""
STORED_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
"""Bytes of one number of all that may be there: quantised weights have the codes too."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20
"""Of one file: some 120,000 tensors."""
MAX_HEADERS_BYTES = 64 << 20
"""Of all files of a checkpoint."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LENGTH_BYTES = 8
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,199}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes lie, counted from the file's beginning, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def read_headers(
    folder: Path, read_index: Callable[[Path], Mapping[str, Any]]
) -> dict[str, TensorInfo]:
    """Return the tensors of a folder's shards; ``read_index`` reads the index, a JSON object.

    Raises :class:`CheckpointError` that names the file: a missing, broken or truncated shard,
    headers that are too long, a tensor in two shards, a dtype that is not served, and an index that
    names other files than plain ones or that disagrees with them.
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
                f"tensor {shown_name(name)} is not in {file} as the index says", str(folder / file)
            )
    return tensors


def weight_map_of(index: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return an index's mapping from tensors to shards, each a plain name of a file beside it.

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
    """Return the tensors of several files; see :func:`read_headers` for what is refused."""
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
    """Return the tensors of one file; raises :class:`CheckpointError` as :func:`read_headers`."""
    begin = _LENGTH_BYTES + _checked_header_bytes(path, MAX_HEADER_BYTES)
    tensors = {}
    try:
        with safe_open(str(path), framework="numpy") as shard:  # it has checked the whole header
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
    """Return how long a file says that its header is; nothing of it is read.

    Raises :class:`CheckpointError` when that is more than ``max_bytes`` or than a file may have,
    and when there is no such file.
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


def _broken(path: Path, why: str) -> CheckpointError:
    # The library's words may hold a tensor's name, which may be anything.
    plain = "".join(char if char.isprintable() else "?" for char in why[:300])
    return CheckpointError(f"is not a whole safetensors file ({plain})", str(path))


def _no_weights(folder: Path) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"has only pickle weights ({', '.join(map(shown_name, pickles[:3]))}), which are never "
            "loaded; convert them to safetensors"
        )
    return f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
