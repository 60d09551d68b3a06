"""Whether Serve still wants the application."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import ApplicationStatus


def app_is_wanted(app: str) -> bool:
    """Return whether Serve lists the application as one that is to run; asks Serve itself."""
    status = serve.status().applications.get(app)
    return status is not None and status.status not in (
        ApplicationStatus.DELETING,
        ApplicationStatus.NOT_STARTED,
    )
