"""``expertmesh doctor``: what is wrong with this machine, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from router.cli.common import REFUSED, AsJson, write_json

if TYPE_CHECKING:
    from router.ops.doctor.doctor import Check

STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(help="A deployment file; its ports, memory and models are looked at too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with this machine, and say what to do.

    Example: expertmesh doctor deploy/cluster.yaml

    The exit code is 1 when there is a problem; warnings are none.
    """
    from router.ops.doctor.probe import examine

    checks = examine(file)
    is_well = all(check.level != "problem" for check in checks)
    if as_json:
        write_json({"ok": is_well, "checks": [asdict(check) for check in checks]}, indent=2)
    else:
        _print_checks(checks)
    if not is_well:
        raise typer.Exit(REFUSED)


def _print_checks(checks: list[Check]) -> None:
    table = Table("what", "", "found, and what to do")
    for check in checks:
        said = f"{check.found}\n{check.advice}" if check.advice else check.found
        table.add_row(check.name, f"[{STYLES[check.level]}]{check.level}[/]", _plain(said))
    Console().print(table)


def _plain(text: str) -> str:
    """Return a text in which no bracket is read as a style."""
    return text.replace("[", r"\[")
