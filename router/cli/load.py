"""``expertmesh load``, ``placement`` and ``rebalance``: the load of experts, and their actors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.reports import LoadStatus, Move, RebalanceReport
from router.cli.common import (
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
from router.client import DEFAULT_ADDRESS

SHOWN_MOVES = 20


def load(
    top: Annotated[int, typer.Option(min=0, help="The number of busiest experts to show.")] = 8,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the recent load of devices and experts.

    Example: expertmesh load --top 3

    Balance is the load of the busiest device over the mean load of all devices; 1 is perfect. It is
    measured by layer, and for all layers together.
    """
    with operator(address, admin_address, api_key) as client:
        status = client.load()
    if as_json:
        write_json(asdict(status), indent=2)
        return
    write(
        f"the last {status.window_s:.0f} s or so   balance: {status.layers_balance:.2f} by layer, "
        f"{status.devices_balance:.2f} in all\n{_last_changes(status)}"
    )
    console = Console()
    table = Table("actor", "node", "experts", "tokens/s", "busy", "wait")
    for device in status.devices:
        table.add_row(
            device.actor_id,
            device.node[:10],
            str(device.experts),
            f"{device.tokens_per_s:.0f}",
            f"{device.busy:.0%}",
            f"{1000 * device.wait_s:.2f} ms",
        )
    console.print(table)
    busiest = sorted(status.experts, key=lambda expert: -expert.tokens_per_s)[:top]
    if busiest:
        table = Table("model", "layer", "expert", "tokens/s", "copies on")
        for expert in busiest:
            rate, actors = f"{expert.tokens_per_s:.0f}", ", ".join(expert.actors)
            table.add_row(expert.model, str(expert.layer), str(expert.expert), rate, actors)
        console.print(table)


def placement(
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show which actors hold each expert, layer by layer.

    Example: expertmesh placement --json
    """
    with operator(address, admin_address, api_key) as client:
        experts = client.load().experts
    if as_json:
        write_json([asdict(expert) for expert in experts], indent=2)
        return
    names = sorted({actor_id for expert in experts for actor_id in expert.actors})
    table = Table("model", "layer", *names, "without a copy")
    for model, layer in sorted({(expert.model, expert.layer) for expert in experts}):
        row = [e for e in experts if (e.model, e.layer) == (model, layer)]
        held = [_ids([e.expert for e in row if name in e.actors]) for name in names]
        table.add_row(model, str(layer), *held, _ids([e.expert for e in row if not e.actors]))
    Console().print(table)


def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")] = False,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move copies of experts to follow their load, while requests run.

    Example: expertmesh rebalance --dry-run

    Returns when the new copies serve and the old copies are freed. The exit code is 1 when the
    rebalancing is refused or fails; the copies that it had already moved stay where they are.
    """
    with operator(address, admin_address, api_key) as client:
        report = client.rebalance(dry_run)
    if as_json:
        write_json(asdict(report), indent=2)
    else:
        _show(report)
    if report.outcome.startswith("failed"):
        fail(report.outcome, REFUSED)


def _show(report: RebalanceReport) -> None:
    write(
        f"{report.outcome} in {report.took_s:.2f} s: balance by layer "
        f"{report.layers_before:.2f} -> {report.layers_after:.2f}, in all "
        f"{report.devices_before:.2f} -> {report.devices_after:.2f}; "
        f"{report.moved_bytes / 1e6:.1f} MB loaded; placement {report.epoch}.{report.version}\n"
    )
    show_moves(report.moves)


def show_moves(moves: Sequence[Move]) -> None:
    """Print the first of the copies that move."""
    if not moves:
        return
    table = Table("model", "layer", "expert", "copy")
    for move in moves[:SHOWN_MOVES]:
        where = f"{'to' if move.is_added else 'from'} {move.actor_id}"
        table.add_row(move.model, str(move.layer), str(move.expert), where)
    Console().print(table)
    if len(moves) > SHOWN_MOVES:
        write(f"and {len(moves) - SHOWN_MOVES} more; --json has all\n")


def _last_changes(status: LoadStatus) -> str:
    """Return a line for the last rebalancing, and a line for the last change."""
    lines = ""
    for last in status.rebalances[:1]:
        copies = sum(move.is_added for move in last.moves)
        lines += f"last rebalancing: {last.outcome}, {copies} copies moved, {_ago(last.at_s)}\n"
    for change in status.changes[:1]:
        lines += (
            f"last change: {change.what}: {change.outcome}, {_ago(change.at_s)} ({change.reason})\n"
        )
    return lines


def _ago(at_s: float) -> str:
    return f"{max(0.0, time.time() - at_s):.0f} s ago"


def _ids(expert_ids: list[int]) -> str:
    """Return ids as ranges: 0-2, 5."""
    parts: list[list[int]] = []
    for expert_id in sorted(expert_ids):
        if parts and parts[-1][-1] == expert_id - 1:
            parts[-1].append(expert_id)
        else:
            parts.append([expert_id])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
