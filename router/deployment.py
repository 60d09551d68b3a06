"""A router as a Serve deployment."""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.config import AppConfig
from router.gateway.ray_upstream import HandleController
from router.link import LinkAddress
from router.logs import failures_logged, setup_logging
from router.replica import RouterReplica
from router.served import ServedModel


class RouterDeployment(RouterReplica):
    """A router as a Serve replica."""

    async def __init__(  # type: ignore[misc]
        self, model: ServedModel, config: AppConfig, controller: Any
    ) -> None:
        """Load the model's dense part and start the engine."""
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged(f"the router of {model.id}"):
            client = HandleController(controller)
            super().__init__(app, model, config.router, config.experts, client)

    async def generate(self, wire: dict[str, Any], address: LinkAddress) -> dict[str, Any]:
        """See :meth:`RouterReplica.generate`."""
        return await super().generate(wire, address)

    def check_health(self) -> None:
        """Raise when the engine's thread has ended; Serve then replaces the replica."""
        if not self.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        """Serve calls this at a graceful end of the replica."""
        self.close()
