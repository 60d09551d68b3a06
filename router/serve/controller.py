"""The controller as a Serve deployment; imports nothing that its quick return would wait for.

A new controller is what a dead actor's successor waits for, so this module is without torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any, ClassVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import TracingConfig

from cluster.controller.controller import Controller
from cluster.controller.records.ledger import LedgerStore
from cluster.controller.records.pool import ExpertPool
from cluster.ray_private import draining_nodes, ray_store, tracing_config
from cluster.reports import ClusterStatus
from cluster.spec import PoolSpec
from experts.remote import RemoteExpertActor
from experts.tracing import EXPORTER_VARIABLE, TO_FILES
from router.config.deployment import EACH_NODE, AppConfig
from router.serve.autoscaling import BareNodes, able_nodes
from router.serve.process import failures_logged, setup_logging, take_turns
from router.serve.waiting import log_what_serve_says

NODES_PERIOD_S, ASK_TIMEOUT_S = 2.0, 30.0

logger = logging.getLogger("expertmesh.controller")


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
        take_turns()
        self._bare = BareNodes()
        self._failed_deploy = ""
        app = serve.get_replica_context().app_name
        with failures_logged("the controller"):
            named = [replace(pool, actor=replace(pool.actor, app=app)) for pool in pools]
            experts = config.experts
            super().__init__(
                app,
                named,
                ExpertPool(app, self.actor_class, await tracing_environment() | config.environment),
                LedgerStore(app, ray_store()),
                experts.min_copies,
                experts.rebalance_period_s,
                experts.redeploy_drain_s,
            )
            await self.start()
        self._run(log_what_serve_says(app, self._note_failed_deploy), "deployments")
        if config.gateway.replicas == EACH_NODE:
            self._run(self._look_for_bare_nodes(config.gateway.num_cpus), "nodes without a gateway")
        self._deletion = asyncio.create_task(self.look_for_deletion(), name="deletion")

    async def _look_for_bare_nodes(self, num_cpus: float) -> None:
        while True:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    nodes = await asyncio.to_thread(ray.nodes)
                    draining = await asyncio.to_thread(draining_nodes)
            except (RayError, RuntimeError, TimeoutError) as error:
                logger.warning("Ray did not list its nodes (%s)", type(error).__name__)
            else:
                gateways = {gateway.node for gateway in self._members.of("gateway")}
                able = able_nodes(nodes, num_cpus, draining)
                self._bare.look(able, gateways, time.monotonic())
            await asyncio.sleep(NODES_PERIOD_S)

    def _note_failed_deploy(self, reason: str) -> None:
        self._failed_deploy = reason

    def _status(self) -> ClusterStatus:
        status, bare = super()._status(), self._bare.ids
        return replace(status, nodes_without_gateway=bare, failed_deploy=self._failed_deploy)

    async def watch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See :meth:`Controller.watch`; adds why the last deployment failed."""
        return await super().watch(*args, **kwargs) | {"failed_deploy": self._failed_deploy}

    async def gateway_deployments(self) -> dict[str, int]:
        """See :meth:`Members.gateway_deployments`; a command that ends Serve calls it by name."""
        return self._members.gateway_deployments()

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica."""
        await self.close()


async def tracing_environment() -> dict[str, str]:
    """Return the variables by which an expert actor traces as Serve's replicas do.

    There are none where Serve itself goes by its variables, which actors inherit too.
    """
    config = await asyncio.to_thread(tracing_config)
    return {} if config is None else {EXPORTER_VARIABLE: exporter_of(config)}


def exporter_of(config: TracingConfig) -> str:
    """Return the exporter that Serve takes by this configuration; empty for none."""
    return (config.exporter_import_path or TO_FILES) if config.enabled else ""
