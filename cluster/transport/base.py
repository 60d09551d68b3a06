"""The interface of the transports that carry a router's frames to expert actors.

A transport only carries bytes. It distinguishes a dead actor from a late answer; the dispatcher
decides what follows.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from cluster.wire.frames import Buffer, Buffers


class CallFailure(enum.StrEnum):
    """The reason for a call without an answer."""

    DIED = "died"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    """The call or its answer was lost on its way; the actor may live."""
    DAMAGED = "damaged"
    """The checksum of the answer is wrong (:mod:`cluster.wire.checksum`)."""


class Call(NamedTuple):
    """One frame for one generation of one actor.

    ``timeout_s`` bounds the wait for the answer. It counts from the frame's last byte, and while
    bytes of it are still to be sent, from the latest byte that the actor took. ``end_s``
    (monotonic) ends the call in any case. ``replaceable`` is true where another actor can
    answer. When the connection of such a call breaks, its outcome is DIED at once. Any other call
    is repeated through Ray, which needs longer to notice a dead actor.
    """

    actor_id: str
    generation: int
    frame: Buffers
    timeout_s: float
    replaceable: bool = False
    end_s: float = math.inf


Outcome = Buffer | CallFailure
IsGone = Callable[[Call, float], bool]
"""Whether a call's actor is gone. It is also told for how many seconds the actor has had the call's
frame, or has taken no byte of it."""

GONE_CHECK_S = 0.2
"""The period in which a wait for answers checks whether an actor has been replaced."""


def never_gone(call: Call, silent_s: float) -> bool:
    """Return false: every call is waited for until its time is over."""
    return False


class PendingCalls(Protocol):
    """Calls that were sent and not answered yet."""

    @property
    def took_s(self) -> float | None:
        """The time from the calls to the last answer, after a wait.

        ``None`` if all answers had begun to arrive before the wait: while the caller computes
        something else, nobody knows when.
        """
        ...

    @property
    def times_s(self) -> Mapping[int, float]:
        """The times from the calls to their answers, after a wait, by the calls' indices.

        An answer that was there before anybody waited for it is left out, as in :attr:`took_s`.
        """
        ...

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
    """Carries frames to actors and returns their answers; for one thread.

    The buffers of a frame do not change until its call is answered, given up or dropped.
    """

    calls: Counter[str]
    """Number of calls by transport, ``ray`` or ``stream``."""

    def send(self, calls: Sequence[Call]) -> PendingCalls:
        """Send all calls at once; bytes that an actor does not take yet leave in the background."""
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
