"""What processes measure of themselves, on its way to whoever is asked for metrics.

Routers and gateways add their samples to the watch call that they make anyway; expert actors report
to the controller. The controller keeps each one's newest, and a gateway asks for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.reports import ClusterStatus, ProcessStatus
from cluster.spec import ActorReport

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
