"""``expertmesh status``: which processes serve and which experts each actor holds."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.status import ActorStatus, ClusterStatus, ProcessStatus
from router.cli.common import Address, AsJson, write, write_json
from router.client import DEFAULT_ADDRESS, Client


def status(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show which processes serve and which experts each actor holds.

    Example: expertmesh status --json
    """
    with Client(address) as client:
        told = client.status()
    if as_json:
        write_json(told.to_wire(), indent=2)
    else:
        _print_status(told)


def _print_status(told: ClusterStatus) -> None:
    ready = "ready" if told.missing_experts == 0 else f"{told.missing_experts} experts missing"
    copies = f"copies: {told.live_copies} live, {told.min_copies} wanted"
    write(
        f"models: {', '.join(told.models)}   placement: epoch {told.epoch}, "
        f"version {told.placement_version}   {ready}   {copies}\n"
        f"controller: pid {told.controller_pid}   "
        f"routers: {_pids(told.routers)}   gateways: {_pids(told.gateways)}\n"
    )
    table = Table("actor", "pid", "node", "device", "generation", "experts", "tokens")
    for actor in told.actors:
        table.add_row(
            actor.actor_id,
            str(actor.pid),
            _short(actor.node),
            actor.device,
            str(actor.generation),
            _experts(actor),
            str(actor.tokens),
        )
    Console().print(table)


def _pids(processes: tuple[ProcessStatus, ...]) -> str:
    return ", ".join(f"{one.pid}@{_short(one.node)}" for one in processes) or "none"


def _short(node: str) -> str:
    """Return the beginning of a node's id, enough to tell nodes apart; --json has all of it."""
    return node[:10]


def _experts(actor: ActorStatus) -> str:
    """Return how many experts an actor holds of each model, and of how many layers."""
    models = sorted({model for model, _, _ in actor.experts})
    parts = []
    for model in models:
        layers = [layer for name, layer, _ in actor.experts if name == model]
        parts.append(f"{model}: {len(layers)} in {len(set(layers))} layers")
    return "; ".join(parts) or "none"
