"""The common parts of the commands that make a served folder of another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router.cli.common import INTERRUPTED, fail, write, write_json
from router.ops.plan.sizes import format_size

if TYPE_CHECKING:
    from experts.convert.plan import Plan
    from router.workshop.folders.card import Record
    from router.workshop.folders.making import OnProgress

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


def make_or_plan(
    plan: Callable[[], Plan],
    make: Callable[[OnProgress], Record],
    dest: Path,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a folder, or check that it can be made; prints what came of it."""
    if dry_run:
        print_plan(plan(), dest, as_json)
        return
    with progress() as on_progress:
        record = make(on_progress)
    print_record(record, dest, as_json)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Show a bar on stderr where it is a terminal; yields the function that moves it."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("reading", total=None)

        def on_progress(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total)

        try:
            yield on_progress
        except KeyboardInterrupt:
            fail(
                "interrupted; what is whole is kept: run the same command again to go on",
                INTERRUPTED,
            )


def print_plan(plan: Plan, dest: Path, as_json: bool) -> None:
    """Print what a dry run found."""
    if as_json:
        write_json({"dest": str(dest), "size_bytes": plan.size_bytes, "files": len(plan.shards)})
        return
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    write(f"{dest} would have {format_size(plan.size_bytes)} in {files}\n")


def print_record(record: Record, dest: Path, as_json: bool) -> None:
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
