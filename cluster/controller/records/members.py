"""The router and gateway replicas that the controller knows from their watch calls."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.reports import Heard, KeyUse, ProcessSamples, ProcessStatus, Samples
from cluster.spec import ModelKernel

MEMBER_TTL_S = 15.0
"""How long a silent replica still counts."""


@dataclass(slots=True)
class _Member:
    kind: str
    process: ProcessStatus
    known: tuple[int, int]
    seen_at_s: float
    samples: Samples | None
    model: str = ""
    kernel_class: str = ""
    heard: Mapping[str, Heard] = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[ModelKernel, ...]:
        """The kernel class of a router's model."""
        return (ModelKernel(self.model, self.kernel_class),) if self.kernel_class else ()

    @property
    def problem(self) -> str:
        """What the replica finds wrong with its keys."""
        return "" if self.samples is None else self.samples.problem


class Members:
    """Router and gateway replicas by their last calls; silent ones are forgotten."""

    def __init__(self) -> None:
        """Begin without any."""
        self._members: dict[str, _Member] = {}

    def heard(
        self,
        kind: str,
        process: ProcessStatus,
        known: tuple[int, int] | None = None,
        samples: Samples | None = None,
        model: str = "",
        kernel_class: str = "",
        heard: Mapping[str, Heard] | None = None,
    ) -> None:
        """Note a replica's call, with the placement (epoch, version) that it knows and its samples.

        ``model`` is the key of a router's model, ``kernel_class`` the class of its dense part,
        ``heard`` the actors that a router has heard lately.
        Samples older than the last ones are dropped: calls may overtake each other, and a counter
        must not go back.
        """
        new = _Member(kind, process, (-1, -1), 0.0, None)
        member = self._members.setdefault(_name(kind, process), new)
        member.known = known or member.known
        member.model = model or member.model
        member.kernel_class = kernel_class or member.kernel_class
        member.heard = heard or {}
        member.seen_at_s = time.monotonic()
        if samples is not None and (
            member.samples is None or samples.taken_s > member.samples.taken_s
        ):
            member.samples = samples

    def of(self, kind: str) -> tuple[ProcessStatus, ...]:
        """Return the replicas of a kind; a router's kernel class is by its model's key."""
        members = self._living(kind)
        return tuple(replace(m.process, kernels=m.kernels, problem=m.problem) for m in members)

    def all_know(self, kind: str, order: tuple[int, int]) -> bool:
        """Return whether all replicas of a kind know this placement or a newer one."""
        return all(m.known >= order for m in self._living(kind))

    def models(self) -> set[str]:
        """Return the keys of the models that routers serve."""
        return {m.model for m in self._living() if m.model}

    def have_called_since(self, kind: str, at_s: float) -> bool:
        """Return whether all replicas of a kind have called since a time."""
        return all(m.seen_at_s > at_s for m in self._living(kind))

    def last_at_s(self) -> float | None:
        """Return when any replica last called; ``None`` without replicas."""
        return max((m.seen_at_s for m in self._living()), default=None)

    def heard_at_s(self, actor_id: str, generation: int) -> float:
        """Return when any router last heard a generation of an actor; long ago if none did."""
        told = [(m.seen_at_s, m.heard.get(actor_id, (-1, 0.0))) for m in self._living()]
        heard = [at_s - age_s for at_s, (heard, age_s) in told if heard == generation]
        return max(heard, default=-math.inf)

    def slowness(self) -> list[Mapping[tuple[str, int], float]]:
        """Return the times of actors' answers that each router measures."""
        return [m.samples.slowness for m in self._living() if m.samples is not None]

    def samples(self) -> tuple[ProcessSamples, ...]:
        """Return the newest samples of all replicas that brought some."""
        living = self._living()
        return tuple(
            ProcessSamples(m.kind, m.process, m.samples) for m in living if m.samples is not None
        )

    def gateway_deployments(self) -> dict[str, int]:
        """Return Serve's names of the gateways' deployments, and how many gateways each has.

        Gateways of a former deployment are among them while they finish their requests.
        """
        gateways = self._living("gateway")
        return Counter(m.samples.deployment for m in gateways if m.samples is not None)

    def uses(self, beside: ProcessStatus) -> dict[str, Mapping[str, KeyUse]]:
        """Return what each gateway but one has used of the quotas of keys, by names."""
        return {
            _name(m.kind, m.process): {} if m.samples is None else m.samples.uses
            for m in self._living("gateway")
            if m.process != beside
        }

    def _living(self, kind: str = "") -> list[_Member]:
        """Return the replicas, or those of a kind, after forgetting silent ones."""
        oldest_at_s = time.monotonic() - MEMBER_TTL_S
        self._members = {key: m for key, m in self._members.items() if m.seen_at_s > oldest_at_s}
        return [m for m in self._members.values() if kind in ("", m.kind)]


def _name(kind: str, process: ProcessStatus) -> str:
    return f"{kind}:{process.node}:{process.pid}"
