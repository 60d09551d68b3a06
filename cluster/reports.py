"""The controller's knowledge of the cluster, as plain data that gateways and commands show.

Routers and gateways add their samples to the watch call that they make anyway; expert actors report
to the controller. The controller keeps the newest of each process, and a gateway asks for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.spec import ActorReport


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """One live expert actor.

    ``experts`` are (model, layer, expert), ``tokens`` rows computed, ``weight_bytes`` what the
    experts' weights take in the device's memory.
    """

    actor_id: str
    pid: int
    node: str
    device: str
    generation: int
    experts: tuple[tuple[str, int, int], ...]
    tokens: int
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadingStatus:
    """How far an actor is that loads its share: experts and bytes in memory, of how many experts.

    It serves none of them before it has all.
    """

    actor_id: str
    held_experts: int
    num_experts: int
    weight_bytes: int


def loading_line(loading: Sequence[LoadingStatus]) -> str:
    """Return the progress of all loading actors together, as one line for people."""
    held = sum(actor.held_experts for actor in loading)
    total = sum(actor.num_experts for actor in loading)
    size_gb = sum(actor.weight_bytes for actor in loading) / 1e9
    actors = f"{len(loading)} actor{'s' if len(loading) > 1 else ''}"
    return f"{held} of {total} experts ({held / max(1, total):.0%}, {size_gb:.1f} GB) on {actors}"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A router or gateway replica that has been heard of lately."""

    pid: int
    node: str


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The answer of ``Admin/GetStatus`` and ``expertmesh status``.

    ``missing_experts`` is how many (model, layer, expert) have no live copy; 0 means ready.
    ``min_copies`` is how many copies of each the configuration asks for, ``live_copies`` how many
    the expert with the fewest has. ``loading`` are the actors that do not serve yet.
    """

    models: tuple[str, ...]
    epoch: int
    placement_version: int
    controller_pid: int
    missing_experts: int
    routers: tuple[ProcessStatus, ...] = ()
    gateways: tuple[ProcessStatus, ...] = ()
    actors: tuple[ActorStatus, ...] = field(default=())
    min_copies: int = 1
    live_copies: int = 0
    loading: tuple[LoadingStatus, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Return the status as a msgpack-able dictionary."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ClusterStatus:
        """Rebuild a status from :meth:`to_wire`."""
        actors = tuple(
            ActorStatus(**{**a, "experts": tuple((m, i, e) for m, i, e in a["experts"])})
            for a in wire["actors"]
        )
        routers = tuple(ProcessStatus(**p) for p in wire["routers"])
        gateways = tuple(ProcessStatus(**p) for p in wire["gateways"])
        return cls(
            **{
                **wire,
                "models": tuple(wire["models"]),
                "routers": routers,
                "gateways": gateways,
                "actors": actors,
                "loading": tuple(LoadingStatus(**one) for one in wire["loading"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of an expert that comes to an actor (``is_added``) or goes from it."""

    actor_id: str
    model: str
    layer: int
    expert: int
    is_added: bool


@dataclass(frozen=True, slots=True)
class RebalanceReport:
    """What one rebalancing decided, and what became of it.

    ``outcome`` is ``committed``, ``planned`` of a dry run, ``balanced`` where nothing was worth
    moving, or ``failed: `` and why. ``at_s`` is wall clock, ``moved_bytes`` what had to be loaded.
    The balances are the busiest device's load over the mean one's: averaged over the layers, and of
    all layers together. ``epoch`` and ``version`` name the placement afterwards.
    """

    outcome: str
    moves: tuple[Move, ...]
    moved_bytes: int
    layers_before: float
    layers_after: float
    devices_before: float
    devices_after: float
    at_s: float
    took_s: float
    epoch: int
    version: int

    def to_wire(self) -> dict[str, Any]:
        """Return the report as a msgpack-able dictionary."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> RebalanceReport:
        """Rebuild a report from :meth:`to_wire`."""
        return cls(**{**wire, "moves": tuple(Move(**move) for move in wire["moves"])})


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """A change of the number of actors, or of one expert's copies, and what became of it.

    ``what`` names the change and ``reason`` who wanted it, for people. ``outcome`` is
    ``committed``, ``planned`` of a dry run, ``unchanged``, ``pending: `` and what actors that were
    asked for wait for, or ``failed: `` and why. ``added`` and ``removed`` are actors; ``at_s`` is
    wall clock.
    """

    what: str
    reason: str
    outcome: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    moves: tuple[Move, ...]
    moved_bytes: int
    at_s: float
    took_s: float
    epoch: int
    version: int

    def to_wire(self) -> dict[str, Any]:
        """Return the report as a msgpack-able dictionary."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ChangeReport:
        """Rebuild a report from :meth:`to_wire`."""
        moves = tuple(Move(**move) for move in wire["moves"])
        added, removed = tuple(wire["added"]), tuple(wire["removed"])
        return cls(**{**wire, "moves": moves, "added": added, "removed": removed})


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One logical expert: token rows a second over all its copies lately, and who holds one."""

    model: str
    layer: int
    expert: int
    tokens_per_s: float
    actors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One actor's device lately.

    ``busy`` is the share of time in which it computed, ``wait_s`` how long a frame waited on
    average.
    """

    actor_id: str
    node: str
    experts: int
    tokens_per_s: float
    busy: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class LoadStatus:
    """The answer of ``Admin/GetLoad``: rates of about the last ``window_s`` seconds.

    ``rebalances`` and ``changes`` are the last ones, the newest first.
    """

    window_s: float
    layers_balance: float
    devices_balance: float
    devices: tuple[DeviceStatus, ...]
    experts: tuple[ExpertLoad, ...]
    rebalances: tuple[RebalanceReport, ...]
    changes: tuple[ChangeReport, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Return the load as a msgpack-able dictionary."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> LoadStatus:
        """Rebuild a load from :meth:`to_wire`."""
        experts = (ExpertLoad(**{**e, "actors": tuple(e["actors"])}) for e in wire["experts"])
        return cls(
            **{
                **wire,
                "devices": tuple(DeviceStatus(**one) for one in wire["devices"]),
                "experts": tuple(experts),
                "rebalances": tuple(RebalanceReport.from_wire(r) for r in wire["rebalances"]),
                "changes": tuple(ChangeReport.from_wire(c) for c in wire["changes"]),
            }
        )


Sample = tuple[str, Mapping[str, str], float]
"""One of Prometheus' samples: its name with any suffix, its labels, its value."""


@dataclass(frozen=True, slots=True)
class Samples:
    """All samples of one process at one moment.

    ``taken_s`` is on the process's own monotonic clock, and only orders its samples. ``families``
    has each metric's samples by its name without a suffix.
    """

    taken_s: float
    families: Mapping[str, Sequence[Sample]]


@dataclass(frozen=True, slots=True)
class ProcessSamples:
    """The newest samples of one router or gateway."""

    kind: str
    process: ProcessStatus
    samples: Samples


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that the controller has heard: from the actors, the routers and the gateways.

    While it is away there is no ``status``, and ``processes`` has only the gateway that is asked.
    """

    status: ClusterStatus | None
    reports: tuple[ActorReport, ...]
    processes: tuple[ProcessSamples, ...]
