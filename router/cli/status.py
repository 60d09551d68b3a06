"""``expertmesh status``: which processes serve and which experts each actor holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.errors import ExpertMeshError
from cluster.reports import ActorStatus, ClusterStatus, ProcessStatus
from cluster.spec import EMULATED
from router.cli.common import Address, AsJson, write, write_json
from router.client import DEFAULT_ADDRESS, Client

BAR_WIDTH = 30


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="With --watch: seconds between two looks.")
    ] = 2.0,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Show which processes serve and which experts each actor holds.

    Example: expertmesh status --watch

    With --watch Ctrl-C ends it, with exit code 0. A server that goes away is said to be away, and
    its last status stays until it is back; one that is not there at first is exit code 3. With
    --json there is one object a line then, `{"error": …}` for a look that failed.
    """
    with Client(address, retry=None) as client:
        first = client.status()
        if watch:
            try:
                _watch(client, first, interval, as_json)
            except KeyboardInterrupt:
                return
        elif as_json:
            write_json(first.to_wire(), indent=2)
        else:
            write(_summary(first) + "\n")
            Console().print(_tables(first))


def _watch(client: Client, told: ClusterStatus, interval_s: float, as_json: bool) -> None:
    """Show one status after the other; ends by an exception only."""
    watched = _Watched(told)
    console = Console()
    if as_json:
        _look(client, watched, interval_s, lambda: write_json(watched.wire()))
    elif not console.is_terminal:
        _look(client, watched, interval_s, lambda: console.print(watched.view(), soft_wrap=True))
    else:
        with Live(console=console, auto_refresh=False) as live:
            _look(client, watched, interval_s, lambda: live.update(watched.view(), refresh=True))


def _look(
    client: Client, watched: _Watched, interval_s: float, show: Callable[[], None]
) -> NoReturn:
    while True:
        show()
        time.sleep(interval_s)
        try:
            watched.saw(client.status())
        except ExpertMeshError as error:
            watched.missed(error)


class _Watched:
    """The last status that came, when, and what has gone wrong since."""

    def __init__(self, told: ClusterStatus) -> None:
        self._told = told
        self._at_s = time.monotonic()
        self._error: ExpertMeshError | None = None
        self._rates: dict[tuple[str, int], float] = {}

    def saw(self, told: ClusterStatus) -> None:
        """Take a new status, and the actors' rates since the last."""
        now_s = time.monotonic()
        before = {(one.actor_id, one.generation): one.tokens for one in self._told.actors}
        self._rates = {
            key: (one.tokens - before[key]) / (now_s - self._at_s)
            for one in told.actors
            if (key := (one.actor_id, one.generation)) in before
        }
        self._told, self._at_s, self._error = told, now_s, None

    def missed(self, error: ExpertMeshError) -> None:
        """Note that no status came."""
        self._error, self._rates = error, {}

    def wire(self) -> dict[str, object]:
        """Return what a line of JSON tells."""
        return self._told.to_wire() if self._error is None else {"error": self._error.to_wire()}

    def view(self) -> Group:
        """Return what a terminal shows."""
        table = _tables(self._told, self._rates)
        if self._error is None:
            note = Text(f"{time.strftime('%H:%M:%S')}   Ctrl-C ends", style="dim")
        else:
            age_s = time.monotonic() - self._at_s
            note = Text(f"{self._error}; above is what was {age_s:.0f} s ago", style="bold red")
        return Group(Text(_summary(self._told)), table, note)


def _summary(told: ClusterStatus) -> str:
    ready = "ready" if told.missing_experts == 0 else f"{told.missing_experts} experts missing"
    copies = f"copies: {told.live_copies} live, {told.min_copies} wanted"
    if any(actor.device == EMULATED for actor in told.actors):
        copies += "   emulated devices: no answer is the model's"
    return (
        f"models: {', '.join(told.models)}   placement: epoch {told.epoch}, "
        f"version {told.placement_version}   {ready}   {copies}\n"
        f"controller: pid {told.controller_pid}   "
        f"routers: {_pids(told.routers)}   gateways: {_pids(told.gateways)}"
    )


def _tables(told: ClusterStatus, rates: dict[tuple[str, int], float] | None = None) -> Group:
    """Return what actors hold, and below it a bar for each that loads its share."""
    if not told.loading:
        return Group(_table(told, rates))
    bars = Table("loading", "", "experts", "memory", box=None, pad_edge=False)
    for one in told.loading:
        bars.add_row(
            one.actor_id,
            ProgressBar(max(1, one.num_experts), one.held_experts, width=BAR_WIDTH),
            f"{one.held_experts} of {one.num_experts}",
            f"{one.weight_bytes / 1e9:.1f} GB",
        )
    return Group(_table(told, rates), bars)


def _table(told: ClusterStatus, rates: dict[tuple[str, int], float] | None = None) -> Table:
    """Return a row for each actor; ``rates`` are tokens a second, by actor and generation."""
    table = Table("actor", "pid", "node", "device", "generation", "experts", "tokens")
    if rates is not None:
        table.add_column("tokens/s")
    for actor in told.actors:
        row = [
            actor.actor_id,
            str(actor.pid),
            _short(actor.node),
            actor.device,
            str(actor.generation),
            _experts(actor),
            str(actor.tokens),
        ]
        if rates is not None:
            rate = rates.get((actor.actor_id, actor.generation))
            row.append("" if rate is None else f"{rate:.0f}")
        table.add_row(*row)
    return table


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
