"""``convert`` writes the shards, one tensor at a time, then the small files, and renames once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_small
from experts.checkpoint.shards import INDEX_FILE
from experts.checkpoint.small_files import text_files_of
from workshop.convert.huggingface import CONFIG_FILE
from workshop.convert.layouts import open_source
from workshop.convert.plan import Piece, Plan, Shard, make_plan
from workshop.convert.shard_writer import write_shard
from workshop.convert.source import read
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
