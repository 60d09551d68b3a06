"""The ``expertmesh`` command line: its commands, each a module of this package.

Neither torch nor ray nor transformers is imported before a command that needs it runs.
"""

from __future__ import annotations

import typer

from router.cli.check import check
from router.cli.generate import generate
from router.cli.status import status
from router.cli.train import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts models from expert actors.\n\n"
    "Exit codes: 0 ok, 1 the server refused or failed, 2 bad usage or configuration, "
    "3 no server answers at the address, 130 interrupted.",
)
app.command()(generate)
app.command()(status)
app.command()(check)
app.command()(train)


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    app()
