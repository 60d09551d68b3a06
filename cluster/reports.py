"""What the controller knows of the cluster, as plain data that gateways and commands show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
