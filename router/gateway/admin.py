"""The gateway's calls of the controller, for operators and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import UnavailableError, error_from_wire
from cluster.reports import (
    ChangeReport,
    ClusterStatus,
    LoadStatus,
    Measurements,
    ProcessSamples,
    RebalanceReport,
    UsageReport,
)
from router.gateway.limits.usage import usage_of

STATUS_TIMEOUT_S = 5.0
CHANGE_TIMEOUT_S = 900.0
MEASURE_TIMEOUT_S = 2.0

logger = logging.getLogger("expertmesh.gateway")


class Admin:
    """Asks the controller of the deployment, with a deadline for each call.

    Every method but :meth:`measurements` raises :class:`UnavailableError` when the controller does
    not answer in time. A method that changes the cluster returns when the change is done, and
    raises the controller's own error when it is refused.
    """

    def __init__(
        self, controller: DeploymentHandle, own_samples: Callable[[], ProcessSamples]
    ) -> None:
        """``own_samples`` returns the newest samples of this gateway."""
        self._controller = controller
        self._own_samples = own_samples

    async def status(self) -> ClusterStatus:
        """Return the processes that serve, and the experts of each actor."""
        return await _answer(self._controller.status.remote(), STATUS_TIMEOUT_S)

    async def load(self) -> LoadStatus:
        """Return the recent load of experts and devices."""
        return await _answer(self._controller.load.remote(), STATUS_TIMEOUT_S)

    async def usage(self) -> UsageReport:
        """Return what the keys of each name have used at all gateways that run."""
        call = self._controller.measurements.remote(self._own_samples())
        return usage_of(await _answer(call, STATUS_TIMEOUT_S))

    async def rebalance(self, dry_run: bool) -> RebalanceReport:
        """Have copies of experts follow the load."""
        return await _report(self._controller.rebalance.remote(dry_run))

    async def scale(self, actors: int, pool: str, dry_run: bool) -> ChangeReport:
        """Bring a pool to a number of actors."""
        return await _report(self._controller.scale.remote(actors, pool, dry_run))

    async def drain(self, target: str, dry_run: bool) -> ChangeReport:
        """Empty and end an actor, or all actors of a node."""
        return await _report(self._controller.drain.remote(target, dry_run))

    async def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool, of_all: bool = False
    ) -> ChangeReport:
        """Bring one expert, or all of a model, to a number of copies."""
        call = self._controller.set_copies.remote(model, layer, expert, copies, dry_run, of_all)
        return await _report(call)

    async def measurements(self) -> Measurements:
        """Return the measurements of the whole cluster, with the newest samples of this gateway.

        While the controller does not answer, they have this gateway's samples alone.
        """
        own = self._own_samples()
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT_S):
                return await self._controller.measurements.remote(own)
        except Exception as error:  # the controller is away, restarts, or is slow
            logger.warning("no metrics from the controller (%s)", type(error).__name__)
            return Measurements(None, (), (own,))


async def _answer(call: Awaitable[Any], timeout_s: float) -> Any:
    """Return the controller's answer; raises ``UnavailableError`` where there is none in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except (RayActorError, RayServeException, TimeoutError):
        raise UnavailableError("the controller does not answer", "", 1.0) from None


async def _report(call: Awaitable[Any]) -> Any:
    """Return the report of a change; raises the controller's error."""
    answer = await _answer(call, CHANGE_TIMEOUT_S)
    if "error" in answer:
        raise error_from_wire(answer["error"])
    return answer["report"]
