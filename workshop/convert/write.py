"""``convert`` finds the layout of a path, writes shards, then small files, and renames once.

A shard is written a tensor at a time: the library's own writer takes all tensors of a file at once.
The format is that of github.com/huggingface/safetensors: the length of the header, the header as
JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError
from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_small
from experts.checkpoint.shards import DTYPES, INDEX_FILE, PICKLE_SUFFIXES, listed_names
from experts.checkpoint.small_files import text_files_of
from workshop.convert.gguf_file import is_gguf, open_gguf
from workshop.convert.huggingface import CONFIG_FILE, is_huggingface, open_huggingface
from workshop.convert.mistral import is_mistral, open_mistral
from workshop.convert.plan import Piece, Plan, Shard, make_plan
from workshop.convert.source import Source, read
from workshop.convert.staging import (
    UNFINISHED,
    ConvertFailedError,
    check_dest,
    finish,
    is_whole,
    staged,
    write_whole,
)

if TYPE_CHECKING:
    import torch


Progress = Callable[[int, int], None]
"""Receives the bytes written so far, and the bytes of all tensors."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion; ``kept_shards`` are from a broken-off conversion."""

    source: str
    layout: str
    dest: str
    source_dtypes: tuple[str, ...]
    dtype: str
    num_tensors: int
    size_bytes: int
    num_shards: int
    kept_shards: int
    has_tokenizer: bool


def convert(
    path: Path, dest: Path, dtype: str, max_shard_bytes: int, progress: Progress
) -> Converted:
    """Write the model at ``path`` to the folder ``dest``, which appears when it is complete.

    ``dtype`` is auto, float32, bfloat16 or float16. At most a tensor is in memory. A broken-off
    conversion continues at its first missing shard; with another source or other options it starts
    again. Raises :class:`CheckpointError` for a wrong source, ``ConfigError`` for a wrong
    ``dest``, and :class:`ConvertFailedError` for a disk that is full or not writable.
    """
    check_dest(dest)
    plan = make_plan(open_source(path), dtype, max_shard_bytes)
    options = {"dtype": plan.dtype, "max_shard_bytes": max_shard_bytes}
    with staged(dest, plan.source, options) as folder:
        kept_shards = write_model(plan, folder, progress)
        open_checkpoint(folder)
    return Converted(
        source=str(path),
        layout=plan.source.layout,
        dest=str(dest),
        source_dtypes=plan.source_dtypes,
        dtype=plan.dtype,
        num_tensors=plan.num_tensors,
        size_bytes=plan.size_bytes,
        num_shards=len(plan.shards),
        kept_shards=kept_shards,
        has_tokenizer=(dest / "tokenizer.json").exists(),
    )


def write_model(plan: Plan, folder: Path, progress: Progress) -> int:
    """Write the missing shards and all small files; returns the number of the shards before.

    Files that the plan does not have are deleted. Raises ``OSError`` for a disk that is full or not
    writable, and :class:`ConvertFailedError` where it is too small.
    """
    wanted = {shard.file for shard in plan.shards}
    for file in folder.iterdir():  # a killed command leaves unfinished files
        if file.name not in wanted:
            file.unlink()
    kept_shards = _write_shards(plan, folder, progress)
    _write_small_files(plan, folder)
    return kept_shards


def _write_shards(plan: Plan, folder: Path, progress: Progress) -> int:
    missing = [shard for shard in plan.shards if not is_whole(folder / shard.file, shard)]
    done_bytes = plan.size_bytes - sum(shard.size_bytes for shard in missing)
    free_bytes, needed_bytes = shutil.disk_usage(folder).free, plan.size_bytes - done_bytes
    if free_bytes < needed_bytes:
        raise ConvertFailedError(
            f"{free_bytes / 1e6:,.0f} MB are free on its disk and {needed_bytes / 1e6:,.0f} MB are "
            "needed; free some space, then run the same command again",
            str(folder.parent),
        )
    progress(done_bytes, plan.size_bytes)
    for shard in missing:
        _write_shard(plan, shard, folder, done_bytes, progress)
        done_bytes += shard.size_bytes
    return len(plan.shards) - len(missing)


def _write_shard(
    plan: Plan, shard: Shard, folder: Path, done_bytes: int, progress: Progress
) -> None:
    def tensors() -> Iterator[torch.Tensor]:
        nonlocal done_bytes
        for piece in shard.pieces:
            yield _converted(plan, piece)
            done_bytes += piece.num_bytes
            progress(done_bytes, plan.size_bytes)

    unfinished = folder / (shard.file + UNFINISHED)
    try:
        write_shard(unfinished, shard, tensors())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finish(unfinished, folder / shard.file)


def _converted(plan: Plan, piece: Piece) -> torch.Tensor:
    import torch

    tensor = read(plan.source.tensors, piece.take)
    cast = tensor.to(getattr(torch, piece.dtype))
    if piece.dtype == "float16" and (cast.isinf() & ~tensor.isinf()).any():
        raise CheckpointError(
            f"tensor {piece.take.name} has values too large for float16; use --dtype bfloat16",
            str(plan.source.path),
        )
    return cast.contiguous()


def _write_small_files(plan: Plan, folder: Path) -> None:
    if len(plan.shards) > 1:
        weight_map = {piece.name: shard.file for shard in plan.shards for piece in shard.pieces}
        index = {"metadata": {"total_size": plan.size_bytes}, "weight_map": weight_map}
        write_whole(folder / INDEX_FILE, json.dumps(index, indent=2).encode())
    beside = [file.name for file in plan.source.folder.iterdir() if file.is_file()]
    for name in text_files_of(beside):
        write_whole(folder / name, read_small(plan.source.folder / name))
    write_whole(folder / CONFIG_FILE, json.dumps(plan.config, indent=2).encode())


_CODES = {name: code for code, name in DTYPES.items()}
_ALIGNMENT = 8


def write_shard(file: Path, shard: Shard, tensors: Iterable[torch.Tensor]) -> None:
    """Write a shard whose tensors come in the order of its pieces, in the pieces' dtypes.

    Wider numbers lie before narrower ones, so that every tensor is aligned. Raises ``OSError``.
    """
    from cluster.wire.tensors import to_bytes

    places = _places(shard)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for piece in shard.pieces:
        begin = places[piece.name]
        header[piece.name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, begin + piece.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        data_begin = opened.tell()
        for piece, tensor in zip(shard.pieces, tensors, strict=True):
            opened.seek(data_begin + places[piece.name])
            opened.write(to_bytes(tensor))


def _places(shard: Shard) -> dict[str, int]:
    """Return where each tensor of a shard begins."""
    places, begin = {}, 0
    for piece in sorted(shard.pieces, key=lambda piece: -DTYPE_BYTES[piece.dtype]):
        places[piece.name] = begin
        begin += piece.num_bytes
    return places


_ALLOWED = (
    "a folder with config.json and safetensors, a folder with params.json and "
    "consolidated*.safetensors, or a .gguf file"
)


def open_source(path: Path) -> Source:
    """Open a model in any known layout; reads the configuration and the headers, and no weight.

    Raises :class:`CheckpointError` for a path without a known layout, for pickles, which are never
    loaded, and for the errors of the layout.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"no such file or folder; allowed: {_ALLOWED}", str(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", str(path)) from None
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickled(path, [path.name])
    if not path.is_file() or not is_gguf(path):
        raise CheckpointError(f"is not a known layout; allowed: {_ALLOWED}", str(path))
    return open_gguf(path)


def _open_folder(path: Path) -> Source:
    if is_huggingface(path):
        return open_huggingface(path)
    if is_mistral(path):
        return open_mistral(path)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickled(path, pickles)
    raise CheckpointError(f"is not a known layout; allowed: {_ALLOWED}", str(path))


def _pickled(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"has only pickle weights ({listed_names(names)}), which can run any "
        "program when they are loaded and so never are; look for the model's safetensors",
        str(path),
    )
