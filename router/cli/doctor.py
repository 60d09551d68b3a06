"""``expertmesh doctor``: finds what is wrong with this machine, and says what to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from router.cli.common import REFUSED, AsJson, write_json

if TYPE_CHECKING:
    from router.ops.doctor.check import Check

STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(help="A deployment file; its ports, memory and models are checked too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with this machine, and say what to do.

    Example: expertmesh doctor deploy/cluster.yaml

    The exit code is 1 when there is a problem; a warning is no problem.
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
    table = Table("check", "", "finding and advice")
    for check in checks:
        verdict = f"{check.found}\n{check.advice}".rstrip()
        table.add_row(check.name, Text(check.level, STYLES[check.level]), Text(verdict))
    Console().print(table)
