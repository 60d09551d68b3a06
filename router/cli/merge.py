"""``expertmesh merge``: a model whose experts are merged into fewer, or into one."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from router.cli.common import AsJson
from router.cli.folders import (
    Dest,
    DryRun,
    MaxShardSize,
    SequenceLength,
    Sequences,
    Source,
    Texts,
    make_or_plan,
)
from router.ops.plan.sizes import parse_size


def merge(
    source: Source,
    dest: Dest,
    experts: Annotated[int, typer.Option(help="Experts of each layer afterwards.")],
    by: Annotated[
        Literal["routing", "output"],
        typer.Option(help="Which experts are alike: by the gate's logits, or by their outputs."),
    ] = "output",
    dense: Annotated[
        bool,
        typer.Option(
            "--dense", help="With --experts 1: write a plain dense model for transformers."
        ),
    ] = False,
    text: Texts = None,
    sequences: Sequences = 64,
    sequence_length: SequenceLength = 256,
    max_shard_size: MaxShardSize = "5GB",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a model whose alike experts are merged: neurons aligned, weighted by use.

    Example: expertmesh merge my-model my-model-4 --experts 4 --text novel.txt

    DEST appears at the end, complete, with a card. The same command resumes an interrupted run.
    """
    from router.workshop.folders.making import source_checkpoint
    from router.workshop.folders.merge import MergeOptions, prepare_merge
    from router.workshop.folders.merge import merge as run

    options = MergeOptions(
        experts=experts,
        by=by,
        dense=dense,
        sequences=sequences,
        sequence_length=sequence_length,
        max_shard_size=parse_size(max_shard_size, "--max-shard-size"),
    )
    given = source_checkpoint(source), dest, options, text or []
    make_or_plan(
        lambda: prepare_merge(*given)[0],
        lambda on_progress: run(*given, on_progress),
        dest,
        dry_run=dry_run,
        as_json=as_json,
    )
