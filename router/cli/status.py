"""``expertmesh status``: shows the serving processes and the experts of each actor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, NoReturn

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.errors import ExpertMeshError
from cluster.reports import ActorStatus, ClusterStatus, ProcessStatus, failing_line
from cluster.spec import EMULATED
from router.cli.common import Address, AdminAddress, ApiKey, AsJson, operator, write, write_json
from router.client import DEFAULT_ADDRESS, Client

BAR_WIDTH = 30


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show the status repeatedly.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="With --watch: seconds between two requests.")
    ] = 2.0,
    address: Address = DEFAULT_ADDRESS,
    admin_address: AdminAddress = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the serving processes and the experts of each actor.

    Example: expertmesh status --watch

    With --watch, Ctrl-C ends the command with exit code 0. While the server is away, its last
    status stays, with the error below; a server that is away at first is exit code 3. With --watch
    and --json, each line is an object, `{"error": …}` for a request that failed.
    """
    with operator(address, admin_address, api_key) as client:
        first = client.status()
        if watch:
            try:
                _watch(client, first, interval, as_json)
            except KeyboardInterrupt:
                return
        elif as_json:
            write_json(asdict(first), indent=2)
        else:
            write(_summary(first) + "\n")
            Console().print(_tables(first))


def _watch(client: Client, first: ClusterStatus, interval_s: float, as_json: bool) -> None:
    """Show a status again and again; ends by an exception only."""
    watched = _Watched(first)
    console = Console()
    if as_json:
        _repeat(client, watched, interval_s, lambda: write_json(watched.wire()))
    elif not console.is_terminal:
        _repeat(client, watched, interval_s, lambda: console.print(watched.view(), soft_wrap=True))
    else:
        with Live(console=console, auto_refresh=False) as live:
            _repeat(client, watched, interval_s, lambda: live.update(watched.view(), refresh=True))


def _repeat(
    client: Client, watched: _Watched, interval_s: float, show: Callable[[], None]
) -> NoReturn:
    while True:
        show()
        time.sleep(interval_s)
        try:
            watched.update(client.status())
        except ExpertMeshError as error:
            watched.failed(error)


class _Watched:
    """The last status, when it came, and the error since then."""

    def __init__(self, status: ClusterStatus) -> None:
        self._status = status
        self._at_s = time.monotonic()
        self._error: ExpertMeshError | None = None
        self._rates: dict[tuple[str, int], float] = {}

    def update(self, status: ClusterStatus) -> None:
        """Take a new status, and the actors' rates since the last."""
        now_s = time.monotonic()
        before = {(actor.actor_id, actor.generation): actor for actor in self._status.actors}
        self._rates = {
            key: (actor.tokens - before[key].tokens) / (now_s - self._at_s)
            for actor in status.actors
            if (key := (actor.actor_id, actor.generation)) in before
        }
        self._status, self._at_s, self._error = status, now_s, None

    def failed(self, error: ExpertMeshError) -> None:
        """Note that no status came."""
        self._error, self._rates = error, {}

    def wire(self) -> dict[str, object]:
        """Return the object of a line of JSON."""
        return asdict(self._status) if self._error is None else {"error": self._error.to_wire()}

    def view(self) -> Group:
        """Return the view of a terminal."""
        table = _tables(self._status, self._rates)
        if self._error is None:
            note = Text(f"{time.strftime('%H:%M:%S')}   Ctrl-C ends", style="dim")
        else:
            age_s = time.monotonic() - self._at_s
            note = Text(f"{self._error}; the status above is {age_s:.0f} s old", style="bold red")
        return Group(Text(_summary(self._status)), table, note)


def _summary(status: ClusterStatus) -> str:
    """Return the lines above the table: two of the cluster, then those of what is not as it should.

    Mixed models, silent actors, failing actors and gateways with a problem have a line each; a last
    line names the slow actors where there are any.
    """
    lines = [_first_lines(status)]
    if status.failed_deploy:
        lines.append(f"the last deployment failed, the former one serves: {status.failed_deploy}")
    lines += [f"{k.model} is mixed: {k.mixed}" for k in status.kernels if k.mixed]
    lines += [f"{actor.actor_id} {actor.silence}" for actor in status.actors if actor.silence]
    lines += map(failing_line, status.failing)
    lines += [f"gateway {_pids((one,))}: {one.problem}" for one in status.gateways if one.problem]
    lines += [f"node {node} has no gateway" for node in status.nodes_without_gateway]
    slow = [
        f"{actor.actor_id}, {actor.slowness:.1f} times as long as its twins"
        for actor in status.actors
        if actor.is_slow
    ]
    if slow:
        lines.append(f"slow: {'; '.join(slow)}")
    return "\n".join(lines)


def _first_lines(status: ClusterStatus) -> str:
    ready = ", ".join(_lacks(status)) or "ready"
    copies = f"copies: {status.live_copies} live, {status.min_copies} wanted"
    if any(actor.device == EMULATED for actor in status.actors):
        copies += "   emulated devices: no answer is the model's"
    return (
        f"models: {', '.join(status.models)}   placement: epoch {status.epoch}, "
        f"version {status.placement_version}   {ready}   {copies}\n"
        f"controller: pid {status.controller_pid}   "
        f"routers: {_pids(status.routers)}   gateways: {_pids(status.gateways)}"
    )


def _lacks(status: ClusterStatus) -> list[str]:
    """Return what keeps requests from being answered."""
    lacks = [f"{status.missing_experts} experts missing"] if status.missing_experts else []
    return lacks if status.routers else [*lacks, "no router runs"]


def _tables(status: ClusterStatus, rates: dict[tuple[str, int], float] | None = None) -> Group:
    """Return a row for each actor, and below a bar for each actor that loads."""
    if not status.loading:
        return Group(_table(status, rates))
    bars = Table("loading", "", "experts", "memory", box=None, pad_edge=False)
    for actor in status.loading:
        bars.add_row(
            actor.actor_id,
            ProgressBar(max(1, actor.num_experts), actor.held_experts, width=BAR_WIDTH),
            f"{actor.held_experts} of {actor.num_experts}",
            f"{actor.weight_bytes / 1e9:.1f} GB",
        )
    return Group(_table(status, rates), bars)


def _table(status: ClusterStatus, rates: dict[tuple[str, int], float] | None = None) -> Table:
    """Return a row for each actor; ``rates`` are tokens a second, by actor and generation."""
    table = Table("actor", "pid", "node", "device", "generation", "experts", "tokens")
    if rates is not None:
        table.add_column("tokens/s")
    for actor in status.actors:
        row = [
            actor.actor_id,
            str(actor.pid),
            _short(actor.node),
            _device(actor),
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
    return ", ".join(f"{process.pid}@{_short(process.node)}" for process in processes) or "none"


def _short(node: str) -> str:
    """Return the beginning of a node's id; --json has all of it."""
    return node[:10]


def _device(actor: ActorStatus) -> str:
    """Return an actor's device and kernel class; the class by model where models differ."""
    classes = {kernel.kernel_class for kernel in actor.kernels}
    if len(classes) > 1:
        classes = {f"{kernel.model}: {kernel.kernel_class}" for kernel in actor.kernels}
    return ", ".join([actor.device, *sorted(classes)])


def _experts(actor: ActorStatus) -> str:
    """Return the numbers of an actor's experts and of their layers, by model."""
    models = sorted({model for model, _, _ in actor.experts})
    parts = []
    for model in models:
        layers = [layer for name, layer, _ in actor.experts if name == model]
        parts.append(f"{model}: {len(layers)} in {len(set(layers))} layers")
    return "; ".join(parts) or "none"
