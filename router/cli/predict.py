"""``expertmesh predict``: asks a mixture for the rows of a CSV file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table as ShownTable
from rich.text import Text

from cluster.errors import InvalidRequestError
from router.cli.common import BAD_USAGE, Address, ApiKey, AsJson, Timeout, fail, printable, write
from router.cli.rows import (
    Table,
    batches,
    output_columns,
    output_objects,
    output_rows,
    parse_rows,
    read_table,
)
from router.client import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Client,
    MixtureInfo,
    Prediction,
    TensorInfo,
)
from router.observability.progress import bar

STDIN = "-"
SHOWN_DIGITS = 6


def predict(
    model: Annotated[str, typer.Argument(help="The id of a mixture.")],
    data: Annotated[str, typer.Argument(help="A CSV file; - is stdin.")],
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header",
            help="Whether the first line has the columns' names; by default it has them where a "
            "cell of it is no number.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A column that is no input; repeatable.")
    ] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="An output to ask for, by default all; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    batch_rows: Annotated[
        int, typer.Option(min=1, max=65_536, help="Most rows of one request.")
    ] = 1024,
    on_expert_loss: Annotated[
        str | None,
        typer.Option(help="strict, next_expert or drop; by default the deployment's."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Ask a mixture for predictions of the rows of a CSV file.

    Example: expertmesh predict digits digits.csv --output label

    A column belongs to the input that it names, as `site` or, for one value of several,
    `pixels[3]`. All other columns, in their order, are the values of the input that the experts
    take. Writes a table to a terminal and CSV elsewhere. With --json it writes an object for each
    row: `{"exact": true, "outputs": {"label": "7"}}`.
    """
    table = _read(data, header)
    with Client(address, api_key=api_key) as client:
        info = client.mixture_info(model)
        outputs = _wanted(info, output)
        try:
            rows = parse_rows(table, info, ignore or ())
        except InvalidRequestError as error:
            fail(f"{data}: {error}", BAD_USAGE)

        def replies() -> Iterator[Prediction]:
            is_shown = None if len(rows) > batch_rows else False
            with bar("rows", len(rows), is_shown) as update:
                for inputs in batches(rows, info, batch_rows):
                    reply = client.predict(model, inputs, output, timeout, on_expert_loss)
                    yield reply
                    update(advance=len(next(iter(inputs.values()))))

        with _opened(out) as file:
            num_inexact = _write(replies(), outputs, file, as_json)
    if num_inexact:
        sys.stderr.write(
            f"{num_inexact} of {len(rows)} rows are in replies that are not exact: an expert was "
            "replaced or left out\n"
        )


def _read(data: str, header: bool | None) -> Table:
    try:
        if data == STDIN:
            return read_table(io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", newline=""), header)
        with open(data, encoding="utf-8-sig", newline="") as file:
            return read_table(file, header)
    except OSError as error:
        fail(f"{data}: {error.strerror}", BAD_USAGE)
    except InvalidRequestError as error:
        fail(f"{data}: {error}", BAD_USAGE)


def _wanted(info: MixtureInfo, names: Sequence[str] | None) -> list[TensorInfo]:
    by_name = {tensor.name: tensor for tensor in info.outputs}
    for name in names or ():
        if name not in by_name:
            fail(
                f"--output: must be one of {', '.join(by_name)}; got {name!r}",
                BAD_USAGE,
            )
    return [by_name[name] for name in names or by_name]


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO | None]:
    if out is None:
        yield None
        return
    try:
        file = out.open("w", encoding="utf-8", newline="")
    except OSError as error:
        fail(f"--out: {out}: {error.strerror}", BAD_USAGE)
    with file:
        yield file


def _write(
    replies: Iterator[Prediction],
    outputs: Sequence[TensorInfo],
    file: TextIO | None,
    as_json: bool,
) -> int:
    """Write the rows of all replies as they come; returns the rows of those that are not exact.

    Of ``outputs`` those are written that the replies have.
    """
    num_inexact = 0
    is_table = file is None and not as_json and sys.stdout.isatty()
    shown = ShownTable()
    stream = _Stdout() if file is None else file
    writer = csv.writer(stream, lineterminator="\n")
    for number, reply in enumerate(replies):
        if number == 0:
            outputs = [tensor for tensor in outputs if tensor.name in reply.outputs]
            for name in output_columns(outputs):
                shown.add_column(_shown(name), overflow="fold")
        if not reply.exact:
            num_inexact += len(next(iter(reply.outputs.values())))
        if as_json:
            for row in output_objects(reply.outputs, outputs):
                stream.write(json.dumps({"exact": reply.exact, "outputs": row}) + "\n")
            continue
        if number == 0 and not is_table:
            writer.writerow(output_columns(outputs))
        for cells in output_rows(reply.outputs, outputs):
            if is_table:
                shown.add_row(*map(_shown, cells))
            else:
                writer.writerow(cells)
    if is_table:
        Console().print(shown)
    return num_inexact


def _shown(cell: Any) -> Text:
    """Return a cell for a terminal; a text of a mixture is neither markup nor a control code."""
    text = f"{cell:.{SHOWN_DIGITS}g}" if isinstance(cell, float) else str(cell)
    return Text(printable(text))


class _Stdout:
    """Stdout for ``csv``, flushed after each row, so that a pipe gets rows as they come."""

    def write(self, text: str) -> None:
        write(text)
