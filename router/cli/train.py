"""``expertmesh train``: trains a small model from text; an interrupted run can resume."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router.cli.common import INTERRUPTED, AsJson, fail, write, write_json

if TYPE_CHECKING:
    from router.workshop.report import Record
    from router.workshop.trainer import StepReport


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
            help="Go on from this Mixtral-format model, with its tokenizer. The settings may leave "
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

    from router.workshop.origin import open_origin
    from router.workshop.picture import can_draw
    from router.workshop.settings import load_config
    from router.workshop.state import STATE_FILE
    from router.workshop.train import StoppedError, Watcher
    from router.workshop.train import train as run

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    again = _command(config, text, out, dense, beside or [], start)
    try:
        origin = open_origin(start) if start is not None else None
        settings = load_config(config, origin.sizes if origin is not None else None)
        if not can_draw():
            sys.stderr.write(
                "no picture of the experts: it needs pip install 'expertmesh[plots]'\n"
            )
        with _Display(settings.optimization.steps) as display:
            record = run(
                settings,
                text,
                out,
                resume=resume,
                dense=dense,
                beside=beside or [],
                origin=origin,
                watcher=Watcher(display.on_phase, display.on_step, display.should_stop),
            )
    except StoppedError as stopped:
        fail(f"stopped; {stopped.steps_done} steps are saved; go on with: {again}", INTERRUPTED)
    except KeyboardInterrupt:
        if (out / STATE_FILE).exists():
            fail(f"interrupted; the saved state is kept; go on with: {again}", INTERRUPTED)
        fail("interrupted; no state was saved", INTERRUPTED)
    if as_json:
        write_json(json.loads(record.to_json()))
    else:
        _print(record, out)


class _Display:
    """The progress bar on stderr, and the handler of Ctrl-C.

    The first Ctrl-C while training stops the run after the current step. Any other Ctrl-C ends it
    at once.
    """

    def __init__(self, steps: int) -> None:
        self._phase = ""
        self._steps = steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("starting", total=steps, pace="")

    def __enter__(self) -> _Display:
        self._progress.start()
        self._former_handler = signal.signal(signal.SIGINT, self._on_sigint)
        return self

    def __exit__(self, *_exception: Any) -> None:
        signal.signal(signal.SIGINT, self._former_handler)
        self._progress.stop()

    def on_phase(self, name: str) -> None:
        self._phase = name
        self._progress.update(self._task, description=name)
        if name == "evaluating":  # a resumed run may have no step left
            self._progress.update(self._task, completed=self._steps)

    def on_step(self, report: StepReport) -> None:
        pace = f"loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        if report.overflow_share:
            pace += f"  {report.overflow_share:.1%} overflow"
        self._progress.update(self._task, completed=report.steps_done, pace=pace)

    def should_stop(self) -> bool:
        return self._phase == "stopping"

    def _on_sigint(self, _signum: int, _frame: Any) -> None:
        if self._phase != "training":
            raise KeyboardInterrupt
        self.on_phase("stopping")


def _command(
    config: Path,
    texts: list[Path],
    out: Path,
    dense: str | None,
    beside: list[Path],
    start: Path | None,
) -> str:
    """Return the command that resumes this run."""
    words = ["expertmesh", "train", str(config)]
    words += [word for path in texts for word in ("--text", str(path))]
    words += ["--out", str(out), *(["--dense", dense] if dense else [])]
    words += [word for path in beside for word in ("--beside", str(path))]
    words += ["--from", str(start)] if start is not None else []
    return shlex.join([*words, "--resume"])


def _print(record: Record, out: Path) -> None:
    from router.workshop.report import shares_table

    figures = record.figures
    if len(figures.expert_shares[0]) > 1:
        Console().print(shares_table(figures.expert_shares))
    for name, source in figures.sources.items():
        write(
            f"{name}: perplexity {source.perplexity:.2f}, unigram {source.unigram_perplexity:.2f}\n"
        )
    write(
        f"held-out perplexity {figures.heldout_perplexity:.2f}, "
        f"unigram {figures.unigram_perplexity:.2f}, on {figures.heldout_tokens:,} tokens\n"
        f"{figures.num_parameters:,} parameters, {figures.num_active_parameters:,} active; "
        f"the checkpoint is in {out}\n"
    )
