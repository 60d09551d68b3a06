"""The ``expertmesh`` command line: a module of this package for each group of commands.

A command imports torch, ray and transformers when it runs, if it needs them.
"""

from __future__ import annotations

from importlib.metadata import version
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
from router.cli.convert import convert
from router.cli.doctor import doctor
from router.cli.evaluate import evaluate
from router.cli.explain import explain
from router.cli.fit import fit
from router.cli.folders import merge, prune, upcycle
from router.cli.generate import generate
from router.cli.keys import keys
from router.cli.load import load, placement, rebalance
from router.cli.plan import plan
from router.cli.predict import predict
from router.cli.scale import copies, drain, scale
from router.cli.serve import deploy, serve
from router.cli.status import status
from router.cli.train import train
from router.cli.usage import usage
from router.client.tls import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE


class _Commands(TyperGroup):
    """All commands; an error of a command is a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with exit_codes():
            return super().invoke(ctx)


def _print_version(is_given: bool) -> None:
    if is_given:
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


_SERVING = (serve, deploy, generate, chat, explain, predict, status, load, placement, usage)
_CHANGING = (rebalance, scale, drain, copies)
_MAKING = (train, fit, convert, evaluate, prune, merge, upcycle)
for _command in (*_SERVING, *_CHANGING, *_MAKING, bench, check, plan, doctor):
    app.command()(_command)
app.add_typer(config, name="config")
app.add_typer(keys, name="keys")
