"""The interface of the transports that carry a router's frames to expert actors.

A transport only carries bytes. It distinguishes a dead actor from a late answer; the dispatcher
decides what follows.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from cluster.wire.frames import Buffer, Buffers


class CallFailure(enum.StrEnum):
    """The reason for a call without an answer."""

    DIED = "died"
    TIMED_OUT = "timed_out"
    DAMAGED = "damaged"
    """The checksum of the answer is wrong (:mod:`cluster.wire.checksum`)."""


class Call(NamedTuple):
    """One frame for one generation of one actor.

    ``timeout_s`` bounds the wait for the answer. ``replaceable`` is true where another actor can
    answer. When the connection of such a call breaks, its outcome is DIED at once. Any other call
    is repeated through Ray, which needs longer to notice a dead actor.
    """

    actor_id: str
    generation: int
    frame: Buffers
    timeout_s: float
    replaceable: bool = False


Outcome = Buffer | CallFailure
IsGone = Callable[[Call], bool]

GONE_CHECK_S = 0.2
"""The period in which a wait for answers checks whether an actor has been replaced."""


def never_gone(call: Call) -> bool:
    """Return false: every call is waited for until its time is over."""
    return False


class PendingCalls(Protocol):
    """Calls that were sent and not answered yet."""

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """Return one outcome per call, in order, each within its call's time.

        The wait asks ``is_gone`` for each open call every ``GONE_CHECK_S``; the outcome of a call
        whose actor is gone is DIED. Late answers are dropped. An actor's failure never raises. The
        answers may be views of memory that the transport's next wait overwrites.
        """
        ...

    def drop(self) -> None:
        """Wait for no call any longer; their answers are dropped when they come."""
        ...


class Transport(Protocol):
    """Carries frames to actors and returns their answers; for one thread."""

    calls: Counter[str]
    """Number of calls by transport, ``ray`` or ``stream``."""

    def send(self, calls: Sequence[Call]) -> PendingCalls:
        """Send all calls at once; the time of each call begins now."""
        ...

    def renew(self, actor_id: str) -> None:
        """Replace the connection to this actor, because a frame was damaged on its way."""
        ...

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """Return whether a call can be sent at once; otherwise start to connect, without a wait.

        The first connection to a new actor may take long. Other copies can serve meanwhile.
        """
        ...

    def close(self) -> None:
        """Close all connections and end all threads."""
        ...
