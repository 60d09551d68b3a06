"""The lease of a detached expert actor: it ends by itself when nobody owns it any more.

The controller renews the lease with every heartbeat. A controller may be away for a while (it is
being restarted), so a lapsed lease alone ends nothing: the actor then asks whether Serve still
lists its application, and ends when it does not.
"""

from __future__ import annotations

import logging
import os
import threading
import time

LEASE_S = 60.0
CHECK_PERIOD_S = 2.0

logger = logging.getLogger("expertmesh.lease")


class Lease:
    """Watches, on a daemon thread, for the controller's renewals; see the module for the rule."""

    def __init__(self, app: str) -> None:
        """Begin with a full lease of ``LEASE_S`` seconds."""
        self._app = app
        self._renewed_s = time.monotonic()

    def start(self) -> None:
        """Start watching; the process exits when the lease has lapsed and the app is gone."""
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self) -> None:
        """Begin a new lease."""
        self._renewed_s = time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_PERIOD_S)
            if time.monotonic() - self._renewed_s < LEASE_S:
                continue
            if serve_lists_app(self._app):
                self.renew()
                continue
            logger.warning("lease of app %s lapsed and Serve does not list it: ending", self._app)
            os._exit(0)


def serve_lists_app(app: str) -> bool:
    """Return whether Ray Serve runs on this cluster and lists the application as not deleted."""
    from ray import serve  # tens of megabytes that an actor needs only when its lease lapsed
    from ray.serve.schema import ApplicationStatus

    try:
        applications = serve.status().applications
    except Exception as error:  # Serve is not running, or its controller does not answer
        logger.warning("Serve did not tell its applications: %s", type(error).__name__)
        return False
    status = applications.get(app)
    return status is not None and status.status != ApplicationStatus.DELETING
