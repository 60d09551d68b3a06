"""What the Serve that runs an application was started with, and how a missing part is replaced.

``expertmesh serve`` starts Serve by a completed deployment file, and so do ``serve run`` and
``serve deploy`` of a file that names our preflight class. ``serve run`` of another file, and
Serve's REST API, start Serve by the file alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig, ServeApplicationSchema

from router.config import IMPORT_PATH
from router.serve.options import base_document
from router.serve.process import setup_logging

SERVE_TIMEOUT_S = 30.0
_BUILD_TASK = "build_serve_application"
_LOG_TO_STDERR = "RAY_SERVE_LOG_TO_STDERR"

logger = logging.getLogger("expertmesh.serve")


def serve_controller() -> Any:
    """Return Serve's own controller, an actor."""
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def our_applications(timeout_s: float = SERVE_TIMEOUT_S) -> list[str]:
    """Return the names of the applications of ExpertMesh that Serve runs by a file.

    There is none where no Serve runs. Raises :class:`TimeoutError` when Serve does not answer.
    """
    try:
        controller = serve_controller()
    except ValueError:  # no actor has the name
        return []
    applications = ray.get(controller.get_app_configs.remote(), timeout=timeout_s)
    return [name for name, app in applications.items() if app.import_path == IMPORT_PATH]


async def own_grpc_address() -> tuple[str, int] | None:
    """Return host and port on which gateways answer gRPC themselves, or ``None``.

    ``None`` where Serve has a gRPC server, and where the file switches gRPC off
    (``grpc_options.port: 0``, ``proxy_location: Disabled``). The host is that of Serve's HTTP.
    Raises :class:`TimeoutError` when Serve does not answer in :data:`SERVE_TIMEOUT_S`.
    """
    controller = serve_controller()
    async with asyncio.timeout(SERVE_TIMEOUT_S):
        grpc, http, location = await asyncio.gather(
            controller.get_grpc_config.remote(),
            controller.get_http_config.remote(),
            controller.get_proxy_location.remote(),
        )
    return grpc_address(grpc, http, location)


async def admin_address(host: str, port: int | None) -> tuple[str, int] | None:
    """Return host and port on which gateways answer operators, or ``None``.

    Without a ``port`` it is the one after Serve's for gRPC, and none where gRPC is off. Raises as
    :func:`own_grpc_address` does.
    """
    if port is not None:
        return host, port
    async with asyncio.timeout(SERVE_TIMEOUT_S):
        grpc = await serve_controller().get_grpc_config.remote()
    return (host, grpc.port + 1) if grpc.port > 0 else None


def grpc_address(
    grpc: gRPCOptions, http: HTTPOptions, location: ProxyLocation | None
) -> tuple[str, int] | None:
    """Return :func:`own_grpc_address` of a Serve with these options."""
    if grpc.port <= 0 or grpc.grpc_servicer_functions or location == ProxyLocation.Disabled:
        return None
    return http.host, grpc.port


def logs_by_default(
    applications: Iterable[ServeApplicationSchema],
    log: LoggingConfig,
    environment: Mapping[str, str],
) -> bool:
    """Tell whether nothing sets how Serve logs, and all applications are ours."""
    are_ours = all(
        application.import_path == IMPORT_PATH and application.logging_config is None
        for application in applications
    )
    return are_ours and log == LoggingConfig() and _LOG_TO_STDERR not in environment


def warn_and_quieten() -> None:
    """Log what a Serve that was started by the file alone lacks; Serve then logs warnings alone.

    For a builder: outside Serve's task that builds an application, this does nothing. Serve's
    logging stays as it is where something sets it, or where another application runs.
    """
    if not _is_builder():
        return
    setup_logging()
    controller = serve_controller()
    asked = [
        controller.get_grpc_config.remote(),
        controller.get_http_config.remote(),
        controller.get_proxy_location.remote(),
        controller.get_app_configs.remote(),
        controller._get_logging_config.remote(),
    ]
    grpc, http, location, applications, (log, _) = ray.get(asked, timeout=SERVE_TIMEOUT_S)
    if logs_by_default(applications.values(), log, os.environ):
        quiet = LoggingConfig(**base_document()["logging_config"])
        ray.get(controller.reconfigure_global_logging_config.remote(quiet), timeout=SERVE_TIMEOUT_S)
    if grpc_address(grpc, http, location) is not None:
        logger.warning(
            "Serve was started by the file alone: its own, slower proxy answers HTTP, and one "
            "gateway of each machine gRPC; `expertmesh serve FILE` fills in Serve's part"
        )


def host_of_builder() -> str | None:
    """Return where the Serve listens whose task builds an application here; ``None`` elsewhere."""
    if not _is_builder():
        return None
    asked = serve_controller().get_http_config.remote()
    return str(ray.get(asked, timeout=SERVE_TIMEOUT_S).host)


def _is_builder() -> bool:
    """Return whether this process runs Serve's task that builds an application."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.worker.mode == ray.WORKER_MODE and context.get_task_name() == _BUILD_TASK
