"""``expertmesh prune``: a model with fewer experts in each layer."""

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


def prune(
    source: Source,
    dest: Dest,
    experts: Annotated[int, typer.Option(help="Experts that stay in each layer.")],
    by: Annotated[
        Literal["weight", "output", "random"],
        typer.Option(
            help="Importance: the gate's weight times the hit rate, the norm of the weighted "
            "output (REAP), or a random number, as a control."
        ),
    ] = "output",
    text: Texts = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --by random.")] = 0,
    sequences: Sequences = 64,
    sequence_length: SequenceLength = 256,
    max_shard_size: MaxShardSize = "5GB",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with the most important experts of each layer.

    Example: expertmesh prune my-model my-model-4 --experts 4 --text novel.txt

    DEST appears at the end, complete, with a card. The same command resumes an interrupted run.
    """
    from router.workshop.folders.making import source_checkpoint
    from router.workshop.folders.prune import PruneOptions, prepare_prune
    from router.workshop.folders.prune import prune as run

    options = PruneOptions(
        experts=experts,
        by=by,
        seed=seed,
        sequences=sequences,
        sequence_length=sequence_length,
        max_shard_size=parse_size(max_shard_size, "--max-shard-size"),
    )
    given = source_checkpoint(source), dest, options, text or []
    make_or_plan(
        lambda: prepare_prune(*given)[0],
        lambda on_progress: run(*given, on_progress),
        dest,
        dry_run=dry_run,
        as_json=as_json,
    )
