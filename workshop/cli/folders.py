"""``expertmesh prune``, ``merge`` and ``upcycle``: they make a served folder of another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from router.cli.common import INTERRUPTED, AsJson, fail, write, write_json
from router.observability.progress import phases
from router.ops.plan.sizes import format_size, parse_size

if TYPE_CHECKING:
    from workshop.convert.plan import Plan
    from workshop.folders.card import Record
    from workshop.folders.making import Command

Source = Annotated[
    str,
    typer.Argument(
        help="A served folder, a folder of the deploy package, or a hub id (owner/name, "
        "owner/name@revision)."
    ),
]
Dest = Annotated[Path, typer.Argument(help="Folder for the new model; new or empty.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="A UTF-8 text for calibration; a fifth of it is held out for the perplexities. "
        "Repeatable.",
    ),
]
Sequences = Annotated[int, typer.Option(help="Most sequences for calibration, and held out.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens of a sequence.")]
MaxShardSize = Annotated[str, typer.Option(help="Most bytes of a file, like 5GB.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, and write nothing.")]


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
    from workshop.folders.making import source_checkpoint
    from workshop.folders.prune.command import Prune, PruneOptions

    options = PruneOptions(
        experts=experts,
        by=by,
        seed=seed,
        sequences=sequences,
        sequence_length=sequence_length,
        max_shard_size=parse_size(max_shard_size, "--max-shard-size"),
    )
    command = Prune(source_checkpoint(source), options)
    _make_or_plan(command, dest, text, dry_run=dry_run, as_json=as_json)


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
    from workshop.folders.making import source_checkpoint
    from workshop.folders.merge.command import Merge, MergeOptions

    options = MergeOptions(
        experts=experts,
        by=by,
        dense=dense,
        sequences=sequences,
        sequence_length=sequence_length,
        max_shard_size=parse_size(max_shard_size, "--max-shard-size"),
    )
    command = Merge(source_checkpoint(source), options)
    _make_or_plan(command, dest, text, dry_run=dry_run, as_json=as_json)


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
    from workshop.folders.dense_model import opened_dense
    from workshop.folders.upcycle.command import Upcycle, UpcycleOptions

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
        command = Upcycle(model, options)
        _make_or_plan(command, dest, text, dry_run=dry_run, as_json=as_json)


def _make_or_plan(
    command: Command, dest: Path, texts: list[Path] | None, *, dry_run: bool, as_json: bool
) -> None:
    """Make a folder, or check that it can be made; prints what came of it."""
    from workshop.folders.making import make_folder, prepare

    if dry_run:
        _print_plan(prepare(command, dest, texts or [])[0], dest, as_json)
        return
    with again_after_ctrl_c(dest), phases("reading") as on_progress:
        record = make_folder(command, dest, texts or [], on_progress)
    _print_record(record, dest, as_json)


@contextmanager
def again_after_ctrl_c(dest: Path) -> Iterator[None]:
    """End a command that can be resumed with a line that says so."""
    from workshop.convert.staging import staging_folder

    try:
        yield
    except KeyboardInterrupt:
        fail(
            f"interrupted; what is whole is kept in {staging_folder(dest)}: run the same command "
            "again to resume",
            INTERRUPTED,
        )


def _print_plan(plan: Plan, dest: Path, as_json: bool) -> None:
    """Print what a dry run found."""
    if as_json:
        write_json({"dest": str(dest), "size_bytes": plan.size_bytes, "files": len(plan.shards)})
        return
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    write(f"{dest} would have {format_size(plan.size_bytes)} in {files}\n")


def _print_record(record: Record, dest: Path, as_json: bool) -> None:
    """Print what was made."""
    if as_json:
        write_json(record.model_dump())
        return
    write(
        f"{dest}: {format_size(record.size_bytes)} of {format_size(record.source_bytes)}; the card "
        "is its README.md\n"
    )
    if record.figures is not None:
        figures = record.figures
        write(
            f"perplexity of {figures.heldout_tokens:,} held-out tokens: "
            f"{figures.perplexity_before:.3f} before, {figures.perplexity_after:.3f} after\n"
        )
