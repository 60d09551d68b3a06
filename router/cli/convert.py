"""``expertmesh convert``: converts a checkpoint from another layout into the served layout."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from router.cli.common import INTERRUPTED, AsJson, fail, write, write_json
from router.ops.plan.sizes import format_size, parse_size

if TYPE_CHECKING:
    from experts.convert.write import Converted


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with params.json and consolidated*.safetensors, a .gguf file, or a "
            "folder with config.json and safetensors."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="Folder for the checkpoint; new or empty.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: the source's most common dtype; of quantised weights, bfloat16."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a file, like 5GB.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Convert a model into the served layout, or change its dtype or shard size.

    Mistral's own files and GGUF hold Mixtral models. A folder with config.json may hold any family,
    quantised or not. Both naming schemes of Grok-1 become the same one.

    Example: expertmesh convert mixtral-q8.gguf my-model --dtype bfloat16

    DEST appears at the end, complete. The same command resumes an interrupted run.
    """
    from experts.convert.staging import finished_shards, staging_folder
    from experts.convert.write import convert as run

    max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    try:
        with _bar() as bar:
            task = bar.add_task("converting", total=None, visible=False)
            done = run(
                source,
                dest,
                dtype,
                max_shard_bytes,
                lambda done_bytes, all_bytes: bar.update(
                    task, completed=done_bytes, total=all_bytes, visible=True
                ),
            )
    except KeyboardInterrupt:
        if kept := finished_shards(dest):
            again = ["expertmesh", "convert", str(source), str(dest), "--dtype", dtype]
            again += ["--max-shard-size", max_shard_size]
            fail(
                f"interrupted; {kept} whole shards are kept in {staging_folder(dest)}; "
                f"go on with: {shlex.join(again)}",
                INTERRUPTED,
            )
        fail("interrupted before a shard was whole; run the same command again", INTERRUPTED)
    if as_json:
        write_json(asdict(done))
    else:
        _print(done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


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
