"""The composition root: builds the Serve application from a deployment file's ``args``.

One controller, one router deployment per model, one gateway deployment as the ingress; the
controller creates the expert actors. Everything is checked before anything is deployed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.config import AppConfig, parse_args
from cluster.contract import OnExpertLoss
from cluster.controller import Controller, app_is_wanted
from cluster.errors import ConfigError, ExpertMeshError
from cluster.spec import ActorSpec
from experts.actor import ExpertActor
from router.gateway.deployment import Gateway
from router.gateway.models import GatewayModel
from router.gateway.ray_upstream import HandleController, RayUpstream
from router.link import LinkAddress
from router.logs import failures_logged, setup_logging
from router.replica import RouterReplica
from router.served import ServedModel, inspect_models

MAX_CONTROL_CALLS = 10_000
GRACEFUL_SHUTDOWN_S = 5.0
DRAIN_CHECK_S = 0.2
SURGE_PERCENT = 1
"""Rounded up by Serve: one replica more than there are to be, while a redeploy replaces them."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}

logger = logging.getLogger("expertmesh.app")


class ControllerDeployment(Controller):
    """The controller as a Serve replica; adds Serve's name of the application."""

    async def __init__(self, spec: ActorSpec, config: AppConfig) -> None:  # type: ignore[misc]
        """Start the controller on the replica's event loop."""
        setup_logging()
        app = serve.get_replica_context().app_name
        with failures_logged("the controller"):
            super().__init__(
                replace(spec, app=app),
                ExpertActor,
                config.experts.actors,
                config.experts.memory_budget_bytes,
                config.experts.min_copies,
            )
            await self.start()
        self._deletion = asyncio.create_task(self.look_for_deletion(), name="deletion")

    async def __del__(self) -> None:
        """Serve awaits this at a graceful end of the replica."""
        await self.close()


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


def build(args: dict[str, Any]) -> Application:
    """Build the application; what ``import_path: router.app:build`` names.

    A wrong configuration or checkpoint becomes the application's message in Serve's status; the
    commands ``serve run`` and ``serve deploy`` have found it before (:mod:`router.preflight`).
    """
    try:
        config = parse_args(args)
        models = inspect_models(config)
        names = deployment_names(models)
    except ExpertMeshError as error:
        # Serve's own exception is the one that it shows without a stack.
        raise RayServeException(str(error)) from None
    spec = ActorSpec(
        app="",
        models=tuple(model.source for model in models),
        num_cpus=config.experts.num_cpus,
        num_gpus=config.experts.num_gpus,
        threads=config.experts.threads,
        max_queue_rows=config.experts.max_queue_rows,
        tls=None if config.experts.tls is None else config.experts.tls.files(),
    )
    controller = _controller().bind(spec, config)
    routers = {
        model.id: _router(names[model.id], config).bind(model, config, controller)
        for model in models
    }
    gateway_models = tuple(_gateway_model(model) for model in models)
    return _gateway(config).bind(  # type: ignore[no-any-return]
        gateway_models,
        config.gateway,
        _upstream,
        controller,
        routers,
        config.gateway.on_expert_loss,
    )


def _upstream(
    controller: DeploymentHandle,
    routers: dict[str, DeploymentHandle],
    on_expert_loss: OnExpertLoss,
) -> RayUpstream:
    """Make a gateway replica's upstream, in the replica."""
    setup_logging()
    app = serve.get_replica_context().app_name
    return RayUpstream(controller, routers, on_expert_loss, partial(app_is_wanted, app))


def deployment_names(models: list[ServedModel]) -> dict[str, str]:
    """Return the router deployment's name of each model; Serve allows fewer characters than ids.

    Raises :class:`ConfigError` when two ids come to the same name.
    """
    names: dict[str, str] = {}
    for model in models:
        name = "Router-" + re.sub(r"[^A-Za-z0-9._-]", "-", model.id)
        if name in names.values():
            raise ConfigError(f"ids {', '.join(m.id for m in models)} are too alike", "args.models")
        names[model.id] = name
    return names


def _controller() -> Any:
    return serve.deployment(
        name="Controller",
        num_replicas=1,
        max_ongoing_requests=MAX_CONTROL_CALLS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_S,
        logging_config=QUIET,
    )(ControllerDeployment)


def _draining(config: AppConfig) -> dict[str, Any]:
    """Return how replicas that serve requests are replaced: the next comes first, and the last
    request of the old one may take its time. When the application is deleted, they end requests
    themselves."""
    return {
        "graceful_shutdown_timeout_s": config.gateway.max_timeout_s + GRACEFUL_SHUTDOWN_S,
        "graceful_shutdown_wait_loop_s": DRAIN_CHECK_S,
        "max_surge_percent": SURGE_PERCENT,
    }


def _router(name: str, config: AppConfig) -> Any:
    router = config.router
    threads = str(router.threads)
    return serve.deployment(
        name=name,
        num_replicas=router.replicas,
        # Everything beyond the engine's own queue is refused there, with a typed error.
        max_ongoing_requests=4 * (router.max_batch_size + router.max_queue_requests),
        ray_actor_options={
            "num_cpus": router.num_cpus,
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": threads,
                    # A heap per thread would keep memory that no other thread reuses.
                    "MALLOC_ARENA_MAX": "1",
                    # Steps bring new numbers of tokens for ever, and oneDNN and torch would each
                    # keep half a megabyte for 1024 shapes; a decode step has five.
                    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
                    "LRU_CACHE_CAPACITY": "16",
                }
            },
        },
        logging_config=QUIET,
        **_draining(config),
    )(RouterDeployment)


def _gateway(config: AppConfig) -> Any:
    return serve.deployment(
        name="Gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        ray_actor_options={"num_cpus": config.gateway.num_cpus},
        logging_config=QUIET,
        **_draining(config),
    )(Gateway)


def _gateway_model(model: ServedModel) -> GatewayModel:
    fields = asdict(model)
    del fields["source"]
    return GatewayModel(**{**fields, "eos_token_ids": model.eos_token_ids})
