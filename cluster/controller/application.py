"""Whether Serve still runs the application."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import ApplicationStatus


def app_is_wanted(app: str) -> bool:
    """Ask Serve whether the application is to run; ``False`` once it is being deleted."""
    status = serve.status().applications.get(app)
    return status is not None and status.status not in (
        ApplicationStatus.DELETING,
        ApplicationStatus.NOT_STARTED,
    )
