"""When a router is lost: which failures mean that its request is sent again, and after how long.

A request that makes its router's process end would end one router after the other. So the deaths of
routers under a request without progress are counted. After two the request asks to be computed
alone, and a router that dies while it computes the request alone ends it.
"""

from __future__ import annotations

import logging

from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.errors import (
    ExpertMeshError,
    InternalError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from router.messages.call_link import LinkBrokenError
from router.retry import Retries, RetryPolicy

RESEND = RetryPolicy(first_delay_s=0.1, max_delay_s=1.0)
RESEND_TOKENS = 8192
"""The budget for sending requests again. When a router dies, a gateway may lose all of its requests
at once; sending them again must take less than half of the budget."""

ROUTER_LOST = (
    LinkBrokenError,
    RayActorError,
    NodeDiedError,
    OutOfMemoryError,
    DeploymentUnavailableError,
)
"""The errors of a call whose router is lost. Ray has one of its own for a process that it ends
because a node's memory is full."""
MAX_TOGETHER = 2
"""Deaths of routers without progress until their request is computed alone."""
MAX_DEATHS = 6
"""Deaths of routers without progress that end their request, even where none was seen alone: a
process may end before it computes."""
TOLD_S = 0.1
"""The least time between a router's death and its judgement, in which its last messages arrive."""
CRASHED = "worker process has died"
"""Ray's words for a process that ended by itself: not one that Serve stops, nor a lost node."""

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
    if isinstance(error, (*ROUTER_LOST, ExpertMeshError)):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("the router's queue is full", "queue", 1.0)
    if isinstance(error, RayTaskError):
        logger.error("a router failed: %s", error)
    else:
        logger.error("a call to a router failed: %r", error)
    return InternalError("the router failed")


class RouterDeaths:
    """Counts the routers that died under one request while it got no new token.

    ``is_alone`` is set while a router says that it computes the request alone. A link that breaks
    may mean a death: it brings a request to suspicion, and convicts none. It comes first if at all,
    since Serve carries the request from then on.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.is_alone = False
        self._times = 0
        self._broken_links = 0
        self._num_tokens = 0

    @property
    def has_any(self) -> bool:
        """Whether a router died without progress since."""
        return self._times + self._broken_links > 0

    @property
    def ask_alone(self) -> bool:
        """Whether the next router is to compute the request alone."""
        return self._times + self._broken_links >= MAX_TOGETHER

    def note(self, error: BaseException, num_tokens: int) -> None:
        """Count a failure if it is a router's death; ``num_tokens`` have come of the request.

        Raises :class:`PoisonedRequestError` where the request is at fault.
        """
        was_alone, self.is_alone = self.is_alone, False
        is_crash, is_break = _is_crash(error), isinstance(error, LinkBrokenError)
        if not is_crash and not is_break:
            return
        if num_tokens > self._num_tokens:
            self._times = self._broken_links = 0
        self._times += is_crash
        self._broken_links += is_break
        self._num_tokens = num_tokens
        if was_alone:
            message = "a router died while computing only this request; earlier routers died too"
            raise PoisonedRequestError(message)
        if self._times >= MAX_DEATHS:
            message = f"{self._times} routers in a row died while they had this request"
            raise PoisonedRequestError(message)


def _is_crash(error: BaseException) -> bool:
    """Return whether a router's process ended by itself, or since memory was full."""
    if isinstance(error, ActorDiedError):
        return CRASHED in str(error)
    return isinstance(error, OutOfMemoryError)
