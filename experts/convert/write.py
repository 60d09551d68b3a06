"""``convert`` writes the shards, one tensor at a time, then the small files, and renames once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_small
from experts.checkpoint.shards import INDEX_FILE
from experts.convert.huggingface import CONFIG_FILE
from experts.convert.layouts import open_source
from experts.convert.plan import Piece, Plan, Shard, make_plan
from experts.convert.source import read
from experts.convert.staging import (
    UNFINISHED,
    ConvertFailedError,
    check_dest,
    finish_shard,
    is_whole,
    job,
    publish,
    staged,
    write_whole,
)

if TYPE_CHECKING:
    import torch

_SMALL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
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

    ``dtype`` is auto, float32, bfloat16 or float16. At most a shard and a tensor are in memory. A
    broken-off conversion continues at its first missing shard; with another source or other options
    it starts again. Raises :class:`CheckpointError` for a wrong source, ``ConfigError`` for a wrong
    ``dest``, and :class:`ConvertFailedError` for a disk that is full or not writable.
    """
    check_dest(dest)
    plan = make_plan(open_source(path), dtype, max_shard_bytes)
    with staged(plan, dest, max_shard_bytes) as folder:
        begun = job(plan, max_shard_bytes)
        kept_shards = _write_shards(plan, folder, progress)
        if job(plan, max_shard_bytes) != begun:
            raise CheckpointError("has changed meanwhile; run the command again", str(path))
        _write_small_files(plan, folder)
        open_checkpoint(folder)
        publish(folder.parent, dest.absolute())
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


def _write_shards(plan: Plan, folder: Path, progress: Progress) -> int:
    """Write the missing shards; returns the number of the others."""
    missing = [
        shard for shard in plan.shards if not is_whole(folder / shard.file, shard, plan.dtype)
    ]
    done_bytes = plan.size_bytes - sum(shard.size_bytes for shard in missing)
    free_bytes, needed_bytes = shutil.disk_usage(folder).free, plan.size_bytes - done_bytes
    if free_bytes < needed_bytes:
        raise ConvertFailedError(
            f"{free_bytes / 1e6:,.0f} MB are free on its disk and {needed_bytes / 1e6:,.0f} MB are "
            "needed; make room, then run the same command again",
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
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for piece in shard.pieces:
        tensor = tensors[piece.name] = _converted(plan, piece)
        done_bytes += tensor.nbytes
        progress(done_bytes, plan.size_bytes)
    unfinished = folder / (shard.file + UNFINISHED)
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    except SafetensorError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(str(error)) from None
    finish_shard(unfinished, folder, shard.file)


def _converted(plan: Plan, piece: Piece) -> torch.Tensor:
    import torch

    tensor = read(plan.source.tensors, piece.take)
    cast = tensor.to(getattr(torch, plan.dtype))
    if plan.dtype == "float16" and (cast.isinf() & ~tensor.isinf()).any():
        raise CheckpointError(
            f"tensor {piece.take.name} has values too large for float16; give --dtype bfloat16",
            str(plan.source.path),
        )
    return cast.contiguous()


def _write_small_files(plan: Plan, folder: Path) -> None:
    if len(plan.shards) > 1:
        weight_map = {piece.name: shard.file for shard in plan.shards for piece in shard.pieces}
        index = {"metadata": {"total_size": plan.size_bytes}, "weight_map": weight_map}
        write_whole(folder / INDEX_FILE, json.dumps(index, indent=2).encode())
    for name in _SMALL_FILES:
        file = plan.source.folder / name
        if file.is_file():
            write_whole(folder / name, read_small(file))
    write_whole(folder / CONFIG_FILE, json.dumps(plan.config, indent=2).encode())
