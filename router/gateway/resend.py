"""When a router is lost: which failures mean that its request is sent again, and after how long."""

from __future__ import annotations

import logging

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.errors import ExpertMeshError, InternalError, OverloadedError, UnavailableError
from router.retry import Retries, RetryPolicy

RESEND = RetryPolicy(first_delay_s=0.1, max_delay_s=1.0)
RESEND_TOKENS = 8192
"""The budget for sending requests again. When a router dies, a gateway may lose all of its requests
at once; sending them again must take less than half of the budget."""

logger = logging.getLogger("expertmesh.gateway")


def resend_delay_s(
    error: Exception, retries: Retries, is_resent: bool, remaining_s: float
) -> float:
    """Return the seconds until a request is sent again; raises its client's error if it is not.

    A full queue refuses a new request. A request that a router has accepted waits for room.
    """
    retry_after_s = None
    if isinstance(error, OverloadedError):
        retry_after_s = error.retry_after_s
        if not is_resent or retry_after_s is None:
            raise error
    delay_s = retries.next_delay_s(remaining_s, retry_after_s)
    if delay_s is None:
        raise UnavailableError("the router is not reachable", "", 1.0) from None
    return delay_s


def failure_of(error: BaseException) -> BaseException:
    """Return an error for the client, or an error that means that the request is sent again."""
    if isinstance(error, (RayActorError, DeploymentUnavailableError, ExpertMeshError)):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("the router's queue is full", "queue", 1.0)
    if isinstance(error, RayTaskError):
        logger.error("a router failed: %s", error)
    else:
        logger.error("a call to a router failed: %r", error)
    return InternalError("the router failed")
