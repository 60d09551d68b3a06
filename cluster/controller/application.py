"""Whether Serve still runs the application."""

from __future__ import annotations

from typing import Any

from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, DeploymentStatus


def app_is_wanted(app: str) -> bool:
    """Ask Serve whether the application is to run; ``False`` once it is being deleted.

    Also ``False`` where no Serve runs. Raises what Ray raises where Serve does not answer.
    """
    # serve.status() would collect every replica of every application, and pickle classes for it.
    # Serve's controller and ours together would spend a twentieth of a core on it.
    return _is_to_run(_status(app))


def is_replaced_later(app: str, deployment: str) -> bool:
    """Ask Serve whether another deployment of its kind is to come after one that is deleted.

    ``deployment`` has its kind before the last hyphen of its name. ``False`` once all replicas of
    the other deployments run, and where there is none. Raises as :func:`app_is_wanted`.
    """
    status, kind = _status(app), deployment.rpartition("-")[0]
    return _is_to_run(status) and any(
        one.name.startswith(f"{kind}-")
        and one.name != deployment
        and one.status is not DeploymentStatus.HEALTHY
        for one in status.deployment_statuses
    )


def _status(app: str) -> Any:
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_status(app)


def _is_to_run(status: Any) -> bool:
    gone = (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)
    return status is not None and status.app_status.status not in gone
