"""The Serve that runs an application: its controller, and our applications."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException

from router.config import IMPORT_PATH
from router.serve.options import NO_PROXIES
from router.serve.process import setup_logging

SERVE_TIMEOUT_S = 30.0
_HAS_PROXIES = (
    "Serve runs proxies, and the gateways listen by themselves: shut Serve down, and write "
    f"`{NO_PROXIES}` at the top of the deployment file, or start it by `expertmesh serve`"
)

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


def refuse_proxies() -> None:
    """Raise ``RayServeException`` where proxies of Serve run: they would hold a gateway's port.

    It is logged, too, since Serve tells of it in its status alone.
    """
    if ray.is_initialized() and serve.status().proxies:
        setup_logging()
        logger.error(_HAS_PROXIES)
        raise RayServeException(_HAS_PROXIES)
