"""``expertmesh evaluate``: perplexity of texts and accuracy on questions, in process or served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from router.cli.common import Address, ApiKey, AsJson, Model, Timeout, write, write_json
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from router.workshop.evaluate.run import Evaluation


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A served folder; with --served only its tokenizer is read."
        ),
    ],
    text: Annotated[
        list[Path] | None, typer.Option(help="A held-out UTF-8 text, for perplexity. Repeatable.")
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(help="A JSONL file with context, choices and answer a line. Repeatable."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence of text; by default 512, or the whole context."),
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Print the use of each expert, of a folder.")
    ] = False,
    served: Annotated[
        bool, typer.Option("--served", help="Ask a running server instead of the folder's weights.")
    ] = False,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts held-out text and answers multiple-choice questions.

    Example: expertmesh evaluate my-model --text held-out.txt --choices questions.jsonl

    A text is cut into sequences without overlap, and every token but a sequence's first is scored.
    A question takes the choice of the largest log-likelihood (acc), or of the largest for each
    character (acc_norm), as lm-eval does. With --json the figures of every expert are printed too.
    """
    from router.workshop.evaluate.run import Served, Task
    from router.workshop.evaluate.run import evaluate as run

    task = Task(text or [], choices or [], sequence_length)
    asked = Served(address, model, timeout, api_key) if served else None
    with _progress() as on:
        found = run(folder, task, asked, on)
    if as_json:
        write_json(asdict(found), indent=2)
    else:
        _print(found, experts)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show how much of each file is done, at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        waiting = progress.add_task("loading", total=None)

        def on(name: str, done: int, total: int) -> None:
            progress.update(waiting, visible=False)
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.advance(tasks[name], done)

        yield on


def _print(found: Evaluation, with_experts: bool) -> None:
    console = Console()
    if found.all_texts is not None:
        table = Table("text", "sequences", "tokens", "perplexity")
        rows = dict(found.texts)
        if len(rows) > 1:
            rows["all"] = found.all_texts
        for name, figures in rows.items():
            table.add_row(
                name,
                f"{figures.sequences:,}",
                f"{figures.tokens:,}",
                f"{figures.perplexity:.2f}",
            )
        console.print(table)
    if found.questions:
        table = Table("questions", "number", "acc", "acc_norm")
        for name, score in found.questions.items():
            table.add_row(
                name,
                f"{score.questions:,}",
                f"{score.acc:.4f} ± {score.acc_stderr:.4f}",
                f"{score.acc_norm:.4f} ± {score.acc_norm_stderr:.4f}",
            )
        console.print(table)
    if with_experts:
        _print_experts(console, found)
    exact = [text.exact for text in found.texts.values()]
    exact += [score.exact for score in found.questions.values()]
    if not all(exact):
        write("some answers were not exact: an expert was replaced or left out\n")


def _print_experts(console: Console, found: Evaluation) -> None:
    """Print a line for each expert: its share of a layer's tokens in each text, its perplexity."""
    if found.all_texts is None or not found.all_texts.experts:
        write("the experts of a token are known of a folder's texts alone\n")
        return
    table = Table("layer", "expert", *found.texts, "perplexity")
    for place, layer in enumerate(found.all_texts.experts):
        for expert_id, perplexity in enumerate(layer.perplexity):
            shares = [
                f"{figures.experts[place].shares[expert_id]:.1%}"
                for figures in found.texts.values()
            ]
            table.add_row(
                str(layer.layer),
                str(expert_id),
                *shares,
                "" if perplexity is None else f"{perplexity:.2f}",
            )
    console.print(table)
