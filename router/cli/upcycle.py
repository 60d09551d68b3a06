"""``expertmesh upcycle``: a mixture made of a dense model."""

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
    Texts,
    make_or_plan,
)
from router.ops.plan.sizes import parse_size


def upcycle(
    source: Annotated[
        str,
        typer.Argument(
            help="A dense Llama-like model: a folder with config.json and safetensors, a hub id, "
            "or a .gguf file."
        ),
    ],
    dest: Dest,
    experts: Annotated[int, typer.Option(help="Experts of each layer.")],
    by: Annotated[
        Literal["split", "copies"],
        typer.Option(
            help="Divide the neurons into experts and a shared expert, or copy the layer into "
            "every expert."
        ),
    ] = "split",
    shared: Annotated[
        int, typer.Option(help="With --by split: the shared expert's size, in experts.")
    ] = 1,
    active: Annotated[
        int | None,
        typer.Option(help="Experts of a token.", show_default="all parts, or two copies"),
    ] = None,
    text: Texts = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the gate of --by copies.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: the source's most common dtype; of quantised weights, bfloat16."),
    ] = "auto",
    sequences: Sequences = 64,
    sequence_length: SequenceLength = 256,
    max_shard_size: MaxShardSize = "5GB",
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Time the model too, for the card: on a quiet machine."),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a dense model as a mixture of experts.

    Example: expertmesh upcycle model.gguf my-model --experts 16 --shared 8 --text novel.txt

    DEST appears at the end, complete, with a card. The same command resumes an interrupted run.
    """
    from router.workshop.folders.dense_model import opened_dense
    from router.workshop.folders.upcycle import UpcycleOptions, prepare_upcycle
    from router.workshop.folders.upcycle import upcycle as run

    options = UpcycleOptions(
        experts=experts,
        by=by,
        shared=shared,
        active=active,
        seed=seed,
        dtype=dtype,
        sequences=sequences,
        sequence_length=sequence_length,
        max_shard_size=parse_size(max_shard_size, "--max-shard-size"),
        speed=speed,
    )
    with opened_dense(source) as model:
        given = model, dest, options, text or []
        make_or_plan(
            lambda: prepare_upcycle(*given).plan,
            lambda on_progress: run(*given, on_progress),
            dest,
            dry_run=dry_run,
            as_json=as_json,
        )
