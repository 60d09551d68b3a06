"""Whether Serve still runs the application."""

from __future__ import annotations

from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus


def app_is_wanted(app: str) -> bool:
    """Ask Serve whether the application is to run; ``False`` once it is being deleted.

    Also ``False`` where no Serve runs. Raises what Ray raises where Serve does not answer.
    """
    # serve.status() would collect every replica of every application, and pickle classes for it.
    # Serve's controller and ours together would spend a twentieth of a core on it.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    status = client.get_serve_status(app).app_status.status
    return status not in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)
