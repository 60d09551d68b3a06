"""The controller as a Serve deployment; imports nothing that its quick return would wait for.

A new controller is what a dead actor's successor waits for, so this module is without torch.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ray import serve

from cluster.config import AppConfig
from cluster.controller import Controller
from cluster.spec import ActorSpec
from experts.remote import RemoteExpertActor
from router.logs import failures_logged, setup_logging


class ControllerDeployment(Controller):
    """The controller as a Serve replica; adds Serve's name of the application."""

    async def __init__(self, spec: ActorSpec, config: AppConfig) -> None:  # type: ignore[misc]
        """Start the controller on the replica's event loop."""
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged("the controller"):
            super().__init__(
                replace(spec, app=app),
                RemoteExpertActor,
                config.experts.actors,
                config.experts.memory_budget_bytes,
                config.experts.min_copies,
            )
            await self.start()
        self._deletion = asyncio.create_task(self.look_for_deletion(), name="deletion")

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica."""
        await self.close()
