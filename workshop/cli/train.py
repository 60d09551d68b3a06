"""``expertmesh train``: trains a small model from text; an interrupted run can resume."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from router.cli.common import INTERRUPTED, AsJson, fail, write, write_json
from router.observability.progress import bar

if TYPE_CHECKING:
    from workshop.train.report import Record
    from workshop.train.run import Watcher
    from workshop.train.trainer import StepReport

_AGAIN = "run the same command with --resume"


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The settings of the run.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A UTF-8 text; two blank lines end a document. Repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; new or empty.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    dense: Annotated[
        Literal["active", "total"] | None,
        typer.Option(help="Train a dense model instead, of the same active or total size."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a finished --dense run to compare with. Repeatable."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Start from this Mixtral-format model, with its tokenizer. The settings may leave "
            "out `model` then.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small Mixtral-format model from text, on one CPU thread.

    Example: expertmesh train train.yaml --text plays.txt --text novels.txt --out my-model

    Ctrl-C ends the run after the current step and saves it; --resume continues it bit by bit. With
    --json the command prints the record of the run, as in training.json.
    """
    import torch
    from transformers.utils import logging

    from workshop.train.origin import open_origin
    from workshop.train.run import StoppedError
    from workshop.train.run import train as run
    from workshop.train.settings import load_config
    from workshop.train.trainer import STATE_FILE

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        origin = open_origin(start) if start is not None else None
        settings = load_config(config, origin.sizes if origin is not None else None)
        with _watched(settings.optimization.steps) as watcher:
            record = run(
                settings,
                text,
                out,
                resume=resume,
                dense=dense,
                beside=beside or [],
                origin=origin,
                watcher=watcher,
            )
    except StoppedError as stopped:
        fail(f"stopped; {stopped.steps_done} steps are saved; {_AGAIN}", INTERRUPTED)
    except KeyboardInterrupt:
        if (out / STATE_FILE).exists():
            fail(f"interrupted; the saved state is kept; {_AGAIN}", INTERRUPTED)
        fail("interrupted; no state was saved", INTERRUPTED)
    if as_json:
        write_json(json.loads(record.to_json()))
    else:
        _print(record, out)


@contextmanager
def _watched(steps: int) -> Iterator[Watcher]:
    """Show the progress.

    The first Ctrl-C while training stops the run after the current step. Any other Ctrl-C ends it
    at once.
    """
    from workshop.train.run import Watcher

    phase = "starting"
    with bar(phase, steps, is_shown=True) as update:

        def on_phase(name: str) -> None:
            nonlocal phase
            phase = name
            update(description=name)
            if name == "evaluating":  # a resumed run may have no step left
                update(completed=steps)

        def on_step(report: StepReport) -> None:
            pace = f"loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s"
            if report.overflow_share:
                pace += f"  {report.overflow_share:.1%} overflow"
            update(completed=report.steps_done, remark=pace)

        def on_sigint(_signum: int, _frame: Any) -> None:
            if phase != "training":
                raise KeyboardInterrupt
            on_phase("stopping")

        former_handler = signal.signal(signal.SIGINT, on_sigint)
        try:
            yield Watcher(on_phase, on_step, lambda: phase == "stopping")
        finally:
            signal.signal(signal.SIGINT, former_handler)


def _print(record: Record, out: Path) -> None:
    figures = record.figures
    for name, source in figures.sources.items():
        write(
            f"{name}: perplexity {source.perplexity:.2f}, unigram {source.unigram_perplexity:.2f}\n"
        )
    write(
        f"held-out perplexity {figures.heldout_perplexity:.2f}, "
        f"unigram {figures.unigram_perplexity:.2f}, on {figures.heldout_tokens:,} tokens\n"
        f"{figures.num_parameters:,} parameters, {figures.num_active_parameters:,} active; "
        f"the checkpoint and its card are in {out}\n"
    )
