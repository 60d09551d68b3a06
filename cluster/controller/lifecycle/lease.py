"""The lease of a detached expert actor: an actor without an application ends itself.

The controller renews the lease with every heartbeat. A controller may be away for a while, as in a
restart, so a lapsed lease by itself ends nothing: the actor then checks if Serve has a replica of
its application, and ends when there has been none for a while.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from ray.util import list_named_actors

LEASE_S = 60.0
ABSENT_S = 20.0
CHECK_PERIOD_S = 2.0

logger = logging.getLogger("expertmesh.lease")


class Lease:
    """When an actor may end; the clock is the caller's."""

    def __init__(self, now_s: float) -> None:
        """Begin with a full lease of ``LEASE_S`` seconds."""
        self._renewed_at_s = now_s
        self._absent_since_s: float | None = None

    def renew(self, now_s: float) -> None:
        """Begin a new lease."""
        self._renewed_at_s = now_s
        self._absent_since_s = None

    def lapsed(self, now_s: float) -> bool:
        """Return whether the controller has been silent for ``LEASE_S``."""
        return now_s - self._renewed_at_s >= LEASE_S

    def orphaned(self, now_s: float, app_is_there: bool) -> bool:
        """Return whether the lease has lapsed and the app has been gone for ``ABSENT_S``."""
        if not self.lapsed(now_s) or app_is_there:
            self._absent_since_s = None
            return False
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        return now_s - self._absent_since_s >= ABSENT_S


def end_when_orphaned(lease: Lease, app: str) -> None:
    """Watch a lease on a daemon thread, and end the process when the actor is orphaned."""

    def watch() -> None:
        while True:
            time.sleep(CHECK_PERIOD_S)
            now_s = time.monotonic()
            if lease.lapsed(now_s) and lease.orphaned(now_s, app_has_replicas(app)):
                logger.warning("the controller and the app %s are gone: ending", app)
                os._exit(0)

    threading.Thread(target=watch, name="lease", daemon=True).start()


def app_has_replicas(app: str) -> bool:
    """Return whether Ray has a Serve replica of the application; takes about a millisecond.

    Serve itself is not asked, since that would load 50 MB of its modules into an expert actor. The
    names of the replicas say the same. Of application, deployment and id only the first may have a
    "#" in it.
    """
    prefix = f"SERVE_REPLICA::{app}"
    actors = list_named_actors(all_namespaces=True)
    return any(entry["name"].rsplit("#", 2)[0] == prefix for entry in actors)
