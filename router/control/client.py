"""The controller's methods that routers and gateways call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.placement.placement import Placement
from cluster.reports import Heard, Samples


class ControllerClient:
    """Calls the controller by its Serve handle, for :class:`PlacementWatcher`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        """``handle`` is the controller deployment's."""
        self._handle = handle

    async def watch(
        self,
        kind: str,
        pid: int,
        node: str,
        known: tuple[int, int],
        timeout_s: float,
        samples: Samples,
        model: str,
        kernel_class: str,
        heard: Mapping[str, Heard],
        own: Placement | None,
    ) -> dict[str, Any]:
        """See :meth:`cluster.controller.controller.Controller.watch`."""
        return await self._handle.watch.remote(
            kind, pid, node, known, timeout_s, samples, model, kernel_class, heard, own
        )

    async def suspect(self, actor_id: str, generation: int, hears_others: bool) -> None:
        """See :meth:`cluster.controller.controller.Controller.suspect`."""
        await self._handle.suspect.remote(actor_id, generation, hears_others)
