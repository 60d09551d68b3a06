"""The gateway's calls of the controller, for operators and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import UnavailableError, error_from_wire
from cluster.reports import (
    KeyUsage,
    Measurements,
    ProcessSamples,
    Samples,
    UsageReport,
)
from router.observability import catalogue

STATUS_TIMEOUT_S = 5.0
CHANGE_TIMEOUT_S = 900.0
MEASURE_TIMEOUT_S = 2.0

logger = logging.getLogger("expertmesh.gateway")
_FIELDS = {"prompt": "prompt_tokens", "generated": "generated_tokens", "rows": "rows"}
"""The field of :class:`KeyUsage` for each kind of :data:`catalogue.KEY_TOKENS`."""


class Admin:
    """Asks the controller of the deployment, with a deadline for each call.

    Every method but :meth:`measurements` raises :class:`UnavailableError` when the controller does
    not answer in time. :meth:`change` returns when the change is done.
    """

    def __init__(
        self, controller: DeploymentHandle, own_samples: Callable[[], ProcessSamples]
    ) -> None:
        """``own_samples`` returns the newest samples of this gateway."""
        self._controller = controller
        self._own_samples = own_samples

    async def ask(self, name: Literal["status", "load"]) -> Any:
        """Return the controller's :class:`ClusterStatus` or :class:`LoadStatus`."""
        return await _answer(getattr(self._controller, name).remote(), STATUS_TIMEOUT_S)

    async def usage(self) -> UsageReport:
        """Return what the keys of each name have used at all gateways that run."""
        call = self._controller.measurements.remote(self._own_samples())
        return usage_of(await _answer(call, STATUS_TIMEOUT_S))

    async def change(self, name: str, *given: object) -> Any:
        """Return the report of a change by the controller's method of this name.

        Raises the controller's own error when it is refused.
        """
        answer = await _answer(getattr(self._controller, name).remote(*given), CHANGE_TIMEOUT_S)
        if "error" in answer:
            raise error_from_wire(answer["error"])
        return answer["report"]

    async def measurements(self) -> Measurements:
        """Return the measurements of the whole cluster, with the newest samples of this gateway.

        While the controller does not answer, they have only this gateway's samples.
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


def usage_of(measurements: Measurements) -> UsageReport:
    """Return what the keys of each name have used, summed over all gateways that run."""
    gateways = [process for process in measurements.processes if process.kind == "gateway"]
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for gateway in gateways:
        for name, field, value in _counts(gateway.samples):
            sums[name][field] += value
    fields = list(KeyUsage.__slots__)[1:]
    keys = (
        KeyUsage(name, **{field: used[field] for field in fields})
        for name, used in sorted(sums.items())
    )
    return UsageReport(len(gateways), tuple(keys))


def _counts(samples: Samples) -> Iterator[tuple[str, str, int]]:
    """Yield a name, a field of :class:`KeyUsage` and a value for each count of one gateway."""
    for _, labels, value in samples.families.get(catalogue.KEY_REQUESTS.name, ()):
        yield labels["key_name"], "requests", int(value)
    for _, labels, value in samples.families.get(catalogue.KEY_TOKENS.name, ()):
        yield labels["key_name"], _FIELDS[labels["kind"]], int(value)
    for _, labels, value in samples.families.get(catalogue.KEY_REFUSALS.name, ()):
        yield labels["key_name"], "refused", int(value)
