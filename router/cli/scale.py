"""``expertmesh scale``, ``drain`` and ``copies``: change actors and copies while requests run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster.reports import ChangeReport
from router.cli.common import (
    BAD_USAGE,
    REFUSED,
    Address,
    AdminAddress,
    ApiKey,
    AsJson,
    fail,
    operator,
    write,
    write_json,
)
from router.cli.load import show_moves
from router.client import DEFAULT_ADDRESS

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")]


def scale(
    actors: Annotated[int, typer.Argument(min=0, help="The new number of actors in the pool.")],
    pool: Annotated[str, typer.Option(help="The pool; needed where there are several.")] = "",
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Change the number of expert actors while requests run.

    Example: expertmesh scale 4

    Returns when the experts are spread over the new number. The actors that are cheapest to drain
    go first. The exit code is 1 when the change is refused or fails, and when Ray has no device for
    a new actor yet; that actor starts when Ray has one.
    """
    with operator(address, admin_address, api_key) as client:
        _show(client.scale(actors, pool, dry_run), as_json)


def drain(
    target: Annotated[str, typer.Argument(help="An actor, or a node by the beginning of its id.")],
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move the experts of an actor, or of a node's actors, to other actors, and end it.

    Example: expertmesh drain expert-1

    Returns when no expert is left on it. The exit code is 1 when the drain is refused or fails.
    """
    with operator(address, admin_address, api_key) as client:
        _show(client.drain(target, dry_run), as_json)


def copies(
    model: Annotated[str, typer.Argument(help="Model id.")],
    which: Annotated[
        list[str],
        typer.Argument(metavar="LAYER EXPERT N|all N", help="An expert or all, and the number."),
    ],
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Set the number of copies of an expert, or of all; a later rebalancing may change it.

    Example: expertmesh copies mesh-tiny 0 3 2

    Example: expertmesh copies mesh-tiny all 2

    The exit code is 1 when the change is refused or fails.
    """
    of_all = which[0] == "all"
    numbers = which[1:] if of_all else which
    if not all(map(str.isdecimal, numbers)) or len(numbers) != (1 if of_all else 3):
        fail(f"copies: needs LAYER EXPERT N, or all N; got {' '.join(which)}", BAD_USAGE)
    with operator(address, admin_address, api_key) as client:
        if of_all:
            report = client.set_all_copies(model, int(numbers[0]), dry_run)
        else:
            layer, expert, number = map(int, numbers)
            report = client.set_copies(model, layer, expert, number, dry_run)
        _show(report, as_json)


def _show(report: ChangeReport, as_json: bool) -> None:
    if as_json:
        write_json(asdict(report), indent=2)
    else:
        actors = [f"+{actor}" for actor in report.added]
        actors += [f"-{actor}" for actor in report.removed]
        write(
            f"{report.what}: {report.outcome} in {report.took_s:.2f} s; {' '.join(actors) or 'no'} "
            f"actors, {report.moved_bytes / 1e6:.1f} MB loaded; "
            f"placement {report.epoch}.{report.version}\n"
        )
        show_moves(report.moves)
    if report.outcome.startswith(("failed", "pending")):
        fail(report.outcome, REFUSED)
