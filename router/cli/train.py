"""``expertmesh train``: a small model from text, with its figures, resumable at any moment."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router.cli.common import BAD_USAGE, INTERRUPTED, REFUSED, AsJson, fail, write, write_json

if TYPE_CHECKING:
    from router.workshop.report import Record
    from router.workshop.trainer import StepReport


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, and how.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A UTF-8 text; two blank lines end a document. Repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; new or empty.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a broken-off run.")] = False,
    dense: Annotated[
        Literal["active", "total"] | None,
        typer.Option(help="Train a dense model instead, of the same active or total size."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a finished --dense run to compare with. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small Mixtral-format model from text, on one CPU thread.

    Example: expertmesh train train.yaml --text plays.txt --text novels.txt --out my-model

    Ctrl-C ends it after the step under way, which is saved; --resume goes on with the same bits.
    With --json the record of the run is printed, as it is in training.json.
    """
    import torch
    from transformers.utils import logging

    from router.workshop.picture import can_draw
    from router.workshop.settings import TrainingError, TrainingFailedError, load_config
    from router.workshop.state import STATE_FILE
    from router.workshop.train import StoppedError, Watcher
    from router.workshop.train import train as run

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    again = _command(config, text, out, dense, beside or [])
    try:
        settings = load_config(config)
        if not can_draw():
            sys.stderr.write(
                "no picture of the experts: it needs pip install 'expertmesh[plots]'\n"
            )
        with _Display(settings.optimization.steps) as display, _gentle_stop(display) as stop:
            record = run(
                settings,
                text,
                out,
                resume=resume,
                dense=dense,
                beside=beside or [],
                watcher=Watcher(display.phase, display.step, stop.asked),
            )
    except TrainingFailedError as error:
        fail(str(error), REFUSED)
    except TrainingError as error:
        fail(str(error), BAD_USAGE)
    except StoppedError as stopped:
        fail(f"stopped; {stopped.steps_done} steps are saved; go on with: {again}", INTERRUPTED)
    except KeyboardInterrupt:
        if (out / STATE_FILE).exists():
            fail(f"interrupted; what was saved stays; go on with: {again}", INTERRUPTED)
        fail("interrupted; nothing had been saved", INTERRUPTED)
    if as_json:
        write_json(record.model_dump())
    else:
        _print(record, out)


class _Display:
    """The progress bar on stderr; ``current`` is the phase that it shows."""

    def __init__(self, steps: int) -> None:
        self.current = ""
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
        return self

    def __exit__(self, *_exception: Any) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        self.current = name
        self._progress.update(self._task, description=name)
        if name == "evaluating":  # of a resumed run too, which may have had no step left
            self._progress.update(self._task, completed=self._steps)

    def step(self, report: StepReport) -> None:
        pace = f"loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s"
        if report.overflow_share:
            pace += f"  {report.overflow_share:.1%} overflow"
        self._progress.update(self._task, completed=report.steps_done, pace=pace)


class _Stop:
    """Whether Ctrl-C asked for an end after the step under way."""

    def __init__(self, display: _Display) -> None:
        self._display = display
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def on_signal(self, _signum: int, _frame: Any) -> None:
        """End between two steps at the first Ctrl-C while training, else at once."""
        if self._asked or self._display.current != "training":
            raise KeyboardInterrupt
        self._asked = True
        self._display.phase("stopping")


@contextmanager
def _gentle_stop(display: _Display) -> Iterator[_Stop]:
    stop = _Stop(display)
    before = signal.signal(signal.SIGINT, stop.on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _command(
    config: Path, texts: list[Path], out: Path, dense: str | None, beside: list[Path]
) -> str:
    """Return the command that goes on with this run."""
    words = ["expertmesh", "train", str(config)]
    words += [word for path in texts for word in ("--text", str(path))]
    words += ["--out", str(out), *(["--dense", dense] if dense else [])]
    words += [word for path in beside for word in ("--beside", str(path))]
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
