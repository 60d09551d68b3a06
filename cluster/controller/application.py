"""Whether Serve still runs the application."""

from __future__ import annotations

from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.ray_private import AppStatus, app_status


def app_is_wanted(app: str) -> bool:
    """Ask Serve whether the application should run; ``False`` once it is being deleted.

    Also ``False`` if Serve is not running. Raises Ray's error if Serve does not answer.
    """
    return _is_to_run(app_status(app))


def is_replaced_later(app: str, deployment: str) -> bool:
    """Ask Serve whether another deployment of its kind will replace one that is being deleted.

    ``deployment`` has its kind before the last hyphen of its name. ``False`` once all replicas of
    the other deployments run, or if there are none. Raises like :func:`app_is_wanted`.
    """
    told, kind = app_status(app), deployment.rpartition("-")[0]
    return (
        told is not None
        and _is_to_run(told)
        and any(
            name.startswith(f"{kind}-")
            and name != deployment
            and state.status is not DeploymentStatus.HEALTHY
            for name, state in told.deployments.items()
        )
    )


def _is_to_run(told: AppStatus | None) -> bool:
    gone = (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)
    return told is not None and told.status not in gone
