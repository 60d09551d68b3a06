"""The controller as a Serve deployment; imports nothing that its quick return would wait for.

A new controller is what a dead actor's successor waits for, so this module is without torch.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import ClassVar

from ray import serve

from cluster.config import AppConfig
from cluster.controller import Controller
from cluster.spec import PoolSpec
from experts.remote import RemoteExpertActor
from router.logs import failures_logged, setup_logging


class ControllerDeployment(Controller):
    """The controller as a Serve replica; adds Serve's name of the application.

    ``actor_class`` is what its expert actors are made of.
    """

    actor_class: ClassVar[type] = RemoteExpertActor

    async def __init__(  # type: ignore[misc]
        self, pools: tuple[PoolSpec, ...], config: AppConfig
    ) -> None:
        """Start the controller on the replica's event loop."""
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged("the controller"):
            named = [replace(pool, actor=replace(pool.actor, app=app)) for pool in pools]
            experts = config.experts
            super().__init__(
                app,
                named,
                self.actor_class,
                experts.min_copies,
                experts.rebalance_period_s,
            )
            await self.start()
        self._deletion = asyncio.create_task(self.look_for_deletion(), name="deletion")

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica."""
        await self.close()
