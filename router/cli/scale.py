"""``expertmesh scale``, ``drain`` and ``copies``: change actors and copies while requests run."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.reports import ChangeReport
from router.cli.common import REFUSED, Address, AsJson, fail, write, write_json
from router.cli.load import show_moves
from router.client import DEFAULT_ADDRESS, Client

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]


def scale(
    actors: Annotated[int, typer.Argument(min=0, help="How many actors the pool is to have.")],
    pool: Annotated[str, typer.Option(help="Which pool; may be left out where there is one.")] = "",
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Have more or fewer expert actors, while requests run.

    Example: expertmesh scale 4

    Returns when experts are spread over them. Those that are cheapest to empty go first. Exit code
    1 when it is refused or fails, or while Ray finds no device for a new one, which it gets later.
    """
    with Client(address, retry=None) as client:
        _show(client.scale(actors, pool, dry_run), as_json)


def drain(
    target: Annotated[str, typer.Argument(help="An actor; or a node, by its id's beginning.")],
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Move the experts of an actor, or of all actors of a node, to others, and end it.

    Example: expertmesh drain expert-1

    Returns when nothing is left on it. Exit code 1 when it is refused or fails.
    """
    with Client(address, retry=None) as client:
        _show(client.drain(target, dry_run), as_json)


def copies(
    model: Annotated[str, typer.Argument(help="Model id.")],
    layer: Annotated[int, typer.Argument(min=0, help="Layer of the expert.")],
    expert: Annotated[int, typer.Argument(min=0, help="The expert.")],
    number: Annotated[int, typer.Argument(min=1, help="How many actors are to hold it.")],
    dry_run: DryRun = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Bring one expert to a number of copies, until a rebalancing finds others better.

    Example: expertmesh copies mesh-tiny 0 3 2

    Exit code 1 when it is refused or fails.
    """
    with Client(address, retry=None) as client:
        _show(client.set_copies(model, layer, expert, number, dry_run), as_json)


def _show(report: ChangeReport, as_json: bool) -> None:
    if as_json:
        write_json(report.to_wire(), indent=2)
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
