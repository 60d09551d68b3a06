"""What the gateway needs of the cluster behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, Measurements, RebalanceReport
from router.control.readiness import Readiness
from router.messages.request import GenerationRequest, TokenEvent


class Upstream(Protocol):
    """The routers and the controller, as one object that tests can replace."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the events of all choices; each choice ends with a ``finish_reason``.

        Raises :class:`cluster.errors.ExpertMeshError`. Closing the generator (``aclose``) or
        cancelling it ends the request upstream.
        """
        ...

    def stop(self, request_id: str, index: int) -> None:
        """Say that choice ``index`` needs no more tokens; its events then end.

        Does not wait. An unknown or finished request is not an error.
        """
        ...

    async def status(self) -> ClusterStatus:
        """Return what the controller knows; raises ``UnavailableError`` while it is away."""
        ...

    async def load(self) -> LoadStatus:
        """Return the load of experts and devices; raises ``UnavailableError`` as above."""
        ...

    async def rebalance(self, dry_run: bool) -> RebalanceReport:
        """Spread the load, or tell how; raises ``UnavailableError`` also where it is refused."""
        ...

    async def scale(self, number: int, pool: str, dry_run: bool) -> ChangeReport:
        """Have a pool of so many actors; raises what :class:`cluster.controller.elastic.Elastic`
        raises."""
        ...

    async def drain(self, target: str, dry_run: bool) -> ChangeReport:
        """Empty and end an actor, or those of a node; raises the same."""
        ...

    async def set_copies(
        self, model: str, layer: int, expert: int, number: int, dry_run: bool
    ) -> ChangeReport:
        """Bring one expert to so many copies; raises the same."""
        ...

    async def measurements(self) -> Measurements:
        """Return all that the cluster measures, with this gateway's newest samples.

        There are those alone while the controller is away.
        """
        ...

    def ready(self) -> Readiness:
        """Tell whether every expert has a live copy, and if not, why; asks nobody."""
        ...
