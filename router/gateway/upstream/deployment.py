"""The deployment behind a gateway: its placement, its readiness, and whether it takes requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ray.serve.handle import DeploymentHandle

from cluster.errors import being_deleted
from cluster.reports import Samples
from cluster.spec import OnExpertLoss
from router.control.client import ControllerClient
from router.control.placement_view import PlacementView, PlacementWatcher
from router.control.readiness import Readiness, is_its_turn, model_readiness, readiness
from router.gateway.limits.charges import Uses

TURN_S, TURN_CHECK_S = 10.0, 0.1
SUCCESSOR_CHECK_S = 0.5

logger = logging.getLogger("expertmesh.gateway")


class Deployment:
    """Follows the controller for all upstreams of a gateway; used only on its event loop."""

    def __init__(
        self,
        controller: DeploymentHandle,
        models: Collection[str],
        on_expert_loss: OnExpertLoss,
        is_wanted: Callable[[], bool],
        is_replaced_later: Callable[[], bool],
        samples: Callable[[], Samples],
        hear_uses: Callable[[Uses], None],
    ) -> None:
        """``models`` are the ids of the served models. Needs a running event loop.

        ``on_expert_loss`` is the deployment's; readiness depends on it. ``is_wanted`` asks Serve
        whether the application shall run, ``is_replaced_later`` whether gateways are to come that
        do not run yet; both may block. ``samples`` returns the gateway's own samples;
        ``hear_uses`` gets what the other gateways have used of quotas.
        """
        self._models = models
        self._on_expert_loss = on_expert_loss
        self._is_replaced_later = is_replaced_later
        self._ends: list[Callable[[], None]] = []
        self._refuses_new = False
        self.is_deleted = False
        self._view = PlacementView()
        self._watcher = PlacementWatcher(
            "gateway",
            self._view,
            ControllerClient(controller),
            is_wanted,
            self.end_requests,
            samples,
            hear_uses=hear_uses,
        )

    def on_end(self, end: Callable[[], None]) -> None:
        """Have ``end`` called when the requests under way are to end."""
        self._ends.append(end)

    def check_open(self) -> None:
        """Raise :class:`UnavailableError` with a hint where no new request is taken."""
        if self._refuses_new or self.is_deleted:
            raise being_deleted()

    def refuse_new_requests(self) -> None:
        """Refuse new requests from now on; those under way go on. Readiness turns negative."""
        self._refuses_new = True

    def end_requests(self) -> None:
        """End all requests; Serve waits for them before it ends a replica. Refuses new ones."""
        self.is_deleted = True
        for end in self._ends:
            end()

    async def take_turn(self, models: Sequence[str]) -> None:
        """Return once this gateway is to serve ``models``, by their keys.

        On a redeploy that is when their routers do (:func:`router.control.readiness.is_its_turn`):
        until then the earlier gateway is there, whose tokenizer is that of the earlier routers.
        Without any placement it is after :data:`TURN_S`.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + TURN_S
        while not all(is_its_turn(self._view.placement, model) for model in models):
            if self._view.placement is None and loop.time() > until_s:
                return
            await asyncio.sleep(TURN_CHECK_S)

    async def wait_for_successors(self) -> bool:
        """Return true once all gateways of the next deployment listen, false to end at once."""
        while not (self._refuses_new or self.is_deleted):
            try:
                if not await asyncio.to_thread(self._is_replaced_later):
                    return True
            except Exception as error:  # Serve itself is away
                logger.warning("Serve does not answer (%s)", type(error).__name__)
            await asyncio.sleep(SUCCESSOR_CHECK_S)
        return False

    def ready(self) -> Readiness:
        """Return whether every expert of every model has a live copy, and if not, why."""
        view = self._view
        ready = readiness(view.placement, self._models, view.loop_age_s(), self._on_expert_loss)
        return self._while_open(replace(ready, failed_deploy=view.failed_deploy))

    def model_ready(self, model: str) -> Readiness:
        """Return whether every expert of one model, by its id, has a live copy."""
        view = self._view
        return self._while_open(
            model_readiness(view.placement, model, view.loop_age_s(), self._on_expert_loss)
        )

    def _while_open(self, ready: Readiness) -> Readiness:
        if self.is_deleted or self._refuses_new:
            return replace(ready, reason=being_deleted().message, is_deleted=True)
        return ready
