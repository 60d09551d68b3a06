"""``expertmesh convert``: converts a checkpoint from another layout into the served layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.cli.common import AsJson, write, write_json
from router.observability.progress import phases
from router.ops.plan.sizes import format_size
from workshop.cli.folders import again_after_ctrl_c
from workshop.folders.options import MAX_SHARD_BYTES, DtypeOption, MaxShardSize

if TYPE_CHECKING:
    from workshop.convert.write import Converted


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with params.json and consolidated*.safetensors, a .gguf file, or a "
            "folder with config.json and safetensors."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="Folder for the checkpoint; new or empty.")],
    dtype: DtypeOption = "auto",
    max_shard_size: MaxShardSize = MAX_SHARD_BYTES,
    as_json: AsJson = False,
) -> None:
    """Convert a model into the served layout, or change its dtype or shard size.

    Mistral's own files and GGUF hold Mixtral models. A folder with config.json may hold any family,
    quantised or not. Both naming schemes of Grok-1 become the same one.

    Example: expertmesh convert mixtral-q8.gguf my-model --dtype bfloat16

    DEST appears at the end, complete. The same command resumes an interrupted run.
    """
    from workshop.convert.write import convert as run

    with again_after_ctrl_c(dest), phases("reading") as on:
        done = run(
            source,
            dest,
            dtype,
            max_shard_size,
            lambda done, total: on("converting, MB", done >> 20, total >> 20),
        )
    if as_json:
        write_json(asdict(done))
    else:
        _print(done)


def _print(done: Converted) -> None:
    shards = "1 file" if done.num_shards == 1 else f"{done.num_shards} files"
    kept = f", {done.kept_shards} of them from before" if done.kept_shards else ""
    write(
        f"{done.dest}: {done.num_tensors:,} tensors, {format_size(done.size_bytes)} of "
        f"{done.dtype} in {shards}{kept}; from {done.layout} ({', '.join(done.source_dtypes)})\n"
    )
    if not done.has_tokenizer:
        write(
            "There is no tokenizer.json beside the source. Before serving, put the model's "
            f"tokenizer.json and tokenizer_config.json into {done.dest}.\n"
        )
