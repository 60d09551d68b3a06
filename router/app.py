"""The composition root: builds the Serve application from a deployment file's ``args``.

One controller, one router deployment per model, one gateway deployment. The controller creates the
expert actors. Everything is checked before anything is deployed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from cluster.environment import GATEWAY_ENVIRONMENT, SERVING_ENVIRONMENT, router_environment
from cluster.errors import ConfigError, ExpertMeshError
from cluster.tls import require_ray_tls
from experts.checkpoint.remote.remote_reader import RayNeighbours
from router.config.deployment import AppConfig, RouterConfig, parse_args
from router.security.reach import check_listen
from router.security.token_file import require_private_token
from router.serve.autoscaling import gateway_options, replica_options
from router.serve.controller import ControllerDeployment
from router.serve.gateway import GatewayReplica
from router.serve.instance import refuse_proxies
from router.serve.options import CONTROLLER, GATEWAY, REPLICA_VARIABLES
from router.serve.router import MixtureDeployment, RouterDeployment
from router.served import Served, ServedModel, inspect_models, pool_specs

MAX_CONTROL_CALLS = 10_000
HANDOVER_S = 7 * 86_400.0
"""How long a gateway of a former deployment waits for its successors at most."""
GRACEFUL_SHUTDOWN_S = 5.0
SURGE_PERCENT = 1
"""Rounded up by Serve: one replica more than there are to be, while a redeploy replaces them."""
REPLICA_OPTIONS: dict[str, Any] = {
    "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
    "graceful_shutdown_wait_loop_s": 0.2,
    # Serve finds out by its next check that a replica is dead; its default is 10 s.
    "health_check_period_s": 1.0,
    "logging_config": {"log_level": "WARNING", "enable_access_log": False},
}


def build(args: dict[str, Any]) -> Application:
    """Build the application; what ``import_path: router.app:build`` names.

    A wrong configuration or checkpoint becomes the application's message in Serve's status; the
    commands ``serve run`` and ``serve deploy`` have found it before
    (:mod:`router.ops.startup.preflight`).
    """
    refuse_proxies()
    return application(args)


def application(
    args: dict[str, Any],
    controller_class: type[ControllerDeployment] = ControllerDeployment,
) -> Application:
    """Build the application as :func:`build` does, with the given class of controller."""
    try:
        require_private_token(os.environ)
        config = parse_args(args)
        if config.experts.tls is not None:
            require_ray_tls("args.experts.tls")
        check_listen(config.gateway.listen.hosts(), config.security, "args.gateway.listen")
        models = inspect_models(config, neighbours=RayNeighbours())
        names = deployment_names(models)
    except ExpertMeshError as error:
        # Serve's own exception is the one that it shows without a stack.
        raise RayServeException(str(error)) from None
    controller = _controller(controller_class, config).bind(
        pool_specs(config.experts, models), config
    )
    routers = {
        model.id: _router(names[model.id], config, _deployment_of(model)).bind(
            model, config, controller
        )
        for model in models
    }
    return _gateway(config).bind(
        tuple(models),
        config.gateway,
        controller,
        routers,
        held_requests(config.router),
        None if config.experts.tls is None else config.experts.tls.files(),
        config.security,
        config.router.prefix_cache,
    )


def deployment_names(models: Sequence[Served]) -> dict[str, str]:
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


def _controller(controller_class: type[ControllerDeployment], config: AppConfig) -> Any:
    return serve.deployment(
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=MAX_CONTROL_CALLS,
        ray_actor_options={"num_cpus": 0, "runtime_env": _runtime_env(SERVING_ENVIRONMENT, config)},
        **REPLICA_OPTIONS,
    )(controller_class)


def _runtime_env(variables: Mapping[str, str], config: AppConfig) -> dict[str, Any]:
    """Return the environment of a replica, with what Serve was not started with."""
    return {"env_vars": {**REPLICA_VARIABLES, **variables, **config.environment}}


def _draining(config: AppConfig) -> dict[str, Any]:
    """Return how replicas that serve requests are replaced: the next comes first, and the last
    request of the old one may take its time. When the application is deleted, they end requests
    themselves."""
    return {
        **REPLICA_OPTIONS,
        "graceful_shutdown_timeout_s": config.gateway.max_timeout_s + GRACEFUL_SHUTDOWN_S,
        "max_surge_percent": SURGE_PERCENT,
    }


def _deployment_of(model: Served) -> type:
    return RouterDeployment if isinstance(model, ServedModel) else MixtureDeployment


def _router(name: str, config: AppConfig, deployment: type = RouterDeployment) -> Any:
    router = config.router
    return serve.deployment(
        name=name,
        **replica_options(router.replicas, router.autoscaling),
        # Everything beyond the engine's own queue is refused there, with a typed error.
        max_ongoing_requests=4 * (router.max_batch_size + router.max_queue_requests),
        ray_actor_options={
            "num_cpus": router.num_cpus,
            "num_gpus": router.num_gpus if deployment is RouterDeployment else 0,
            "runtime_env": _runtime_env(router_environment(router.threads), config),
        },
        **_draining(config),
    )(deployment)


def held_requests(router: RouterConfig) -> int:
    """Return how many requests all routers of a model hold at most, each choice as one.

    Where their number follows their use that is what the most of them would hold: with fewer, a
    router refuses what it has no room for.
    """
    most = router.replicas if router.autoscaling is None else router.autoscaling.max_replicas
    return most * (router.max_batch_size + router.max_queue_requests)


def _gateway(config: AppConfig) -> Any:
    return serve.deployment(
        # Another name each time: the former gateways then end by themselves, once the new ones
        # listen, and Serve need not find two places on one node for one deployment.
        name=f"{GATEWAY}-{secrets.token_hex(3)}",
        **gateway_options(config.gateway, ray.nodes() if ray.is_initialized() else ()),
        ray_actor_options={
            "num_cpus": config.gateway.num_cpus,
            "runtime_env": _runtime_env(GATEWAY_ENVIRONMENT, config),
        },
        **(REPLICA_OPTIONS | {"graceful_shutdown_timeout_s": HANDOVER_S}),
    )(GatewayReplica)
