"""``expertmesh evaluate``: perplexity of texts, in process or served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from router.cli.common import Address, ApiKey, AsJson, Model, Timeout, write, write_json
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from router.observability.progress import phases

if TYPE_CHECKING:
    from workshop.evaluate.run import Evaluation


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
    """Measure how well a model predicts held-out text.

    Example: expertmesh evaluate my-model --text held-out.txt

    A text is cut into sequences without overlap, and every token but a sequence's first is scored.
    With --json the figures of every expert are printed too. For multiple-choice questions run
    lm-eval against a server.
    """
    from workshop.evaluate.run import Served
    from workshop.evaluate.run import evaluate as run

    asked = Served(address, model, timeout, api_key) if served else None
    with phases("loading") as on:
        found = run(folder, text or [], sequence_length, asked, on)
    if as_json:
        write_json(asdict(found), indent=2)
    else:
        _print(found, experts)


def _print(found: Evaluation, with_experts: bool) -> None:
    console = Console()
    table = Table("text", "sequences", "tokens", "perplexity")
    rows = dict(found.texts)
    if len(rows) > 1:
        rows["all"] = found.all_texts
    for name, figures in rows.items():
        counts = f"{figures.sequences:,}", f"{figures.tokens:,}"
        table.add_row(name, *counts, f"{figures.perplexity:.2f}")
    console.print(table)
    if with_experts:
        _print_experts(console, found)
    if not found.all_texts.exact:
        write("some answers were not exact: an expert was replaced or left out\n")


def _print_experts(console: Console, found: Evaluation) -> None:
    """Print a line for each expert: its share of a layer's tokens in each text, its perplexity."""
    if not found.all_texts.experts:
        write("only a folder's own model tells the experts of its tokens, not a served one\n")
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
