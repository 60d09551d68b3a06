"""The ``expertmesh`` command line: a module of this package for each group of commands.

A command imports torch, ray and transformers when it runs, if it needs them. Other packages add
commands by entry points of the group :data:`MORE_COMMANDS`, as the workshop does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from router.cli.bench import bench
from router.cli.chat import chat
from router.cli.common import (
    TlsAuthority,
    TlsCertificate,
    TlsKey,
    exit_codes,
    variables,
    write,
)
from router.cli.config import check, config
from router.cli.doctor import doctor
from router.cli.generate import generate
from router.cli.keys import keys
from router.cli.load import load, placement, rebalance
from router.cli.plan import plan
from router.cli.predict import predict
from router.cli.running import logs, stop
from router.cli.scale import copies, drain, scale
from router.cli.serve import deploy, serve
from router.cli.status import status
from router.cli.usage import usage
from router.client.tls import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE

MORE_COMMANDS, MORE_PANEL = "expertmesh.commands", "Make models"
_STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Commands(TyperGroup):
    """All commands; an error of a command is a line on stderr and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, the order of the help."""
        return [*super().list_commands(ctx), *sorted(entry_points(group=MORE_COMMANDS).names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a name, imported only now if it is another package's."""
        for point in entry_points(group=MORE_COMMANDS, name=cmd_name):
            alone = typer.Typer(**_STYLE)
            alone.command(cmd_name, rich_help_panel=MORE_PANEL)(point.load())
            return typer.main.get_command(alone)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        with exit_codes():
            return super().invoke(ctx)


def _print_version(is_given: bool) -> None:
    if is_given:
        write(f"expertmesh {version('expertmesh')}\n")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    **_STYLE,
)


@app.callback(
    help="Serve Mixture-of-Experts models from expert actors.\n\n"
    "Exit codes: 0 ok, 1 the server refused or failed, 2 bad usage or configuration, "
    "3 no server answers at the address, 130 interrupted.",
)
def _options(
    ctx: typer.Context,
    print_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    authority: TlsAuthority = None,
    certificate: TlsCertificate = None,
    key: TlsKey = None,
) -> None:
    """Take the options before a command; those of TLS hold for all clients that it makes."""
    given = {AUTHORITY_VARIABLE: authority, CERTIFICATE_VARIABLE: certificate, KEY_VARIABLE: key}
    ctx.with_resource(variables({name: file for name, file in given.items() if file is not None}))


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Serve": (serve, deploy, stop, logs),
    "Ask": (generate, chat, predict, bench),
    "Look": (status, load, placement, usage),
    "Change": (rebalance, scale, drain, copies),
    "Prepare": (check, plan, doctor),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(config, name="config", rich_help_panel="Prepare")
app.add_typer(keys, name="keys", rich_help_panel="Prepare")
