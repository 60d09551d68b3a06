"""The ``expertmesh`` command line: its commands, each a module of this package.

Neither torch nor ray nor transformers is imported before a command that needs it runs.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from router.cli.bench import bench
from router.cli.chat import chat
from router.cli.common import exit_codes, write
from router.cli.config import check, config
from router.cli.convert import convert
from router.cli.doctor import doctor
from router.cli.generate import generate
from router.cli.load import load, placement, rebalance
from router.cli.plan import plan
from router.cli.scale import copies, drain, scale
from router.cli.serve import serve
from router.cli.status import status
from router.cli.train import train


class _Commands(TyperGroup):
    """All commands; an error of any is one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with exit_codes():
            return super().invoke(ctx)


def _print_version(asked: bool) -> None:
    if asked:
        write(f"expertmesh {version('expertmesh')}\n")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(
    help="Serve Mixture-of-Experts models from expert actors.\n\n"
    "Exit codes: 0 ok, 1 the server refused or failed, 2 bad usage or configuration, "
    "3 no server answers at the address, 130 interrupted.",
)
def _options(
    print_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Take what stands before a command."""


app.command()(serve)
app.command()(generate)
app.command()(chat)
app.command()(status)
app.command()(load)
app.command()(placement)
app.command()(rebalance)
app.command()(scale)
app.command()(drain)
app.command()(copies)
app.command()(bench)
app.command()(check)
app.add_typer(config, name="config")
app.command()(plan)
app.command()(doctor)
app.command()(train)
app.command()(convert)
