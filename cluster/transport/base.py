"""How a router's frames reach expert actors: the transport interface, and the one over Ray calls.

A transport only carries bytes. It tells an actor that is gone from one that does not answer in
time; what to do about either is the dispatcher's business. The other transport is
:mod:`cluster.transport.stream`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from cluster.wire.frames import Buffer, Parts


class CallFailure(enum.StrEnum):
    """Why a call brought no frame back."""

    DIED = "died"
    TIMED_OUT = "timed_out"


class Call(NamedTuple):
    """One frame for one generation of one actor.

    ``replaceable`` says that another actor can answer it: where its connection breaks, that is told
    at once rather than asked of Ray, which needs longer to know that an actor is dead.
    """

    actor_id: str
    generation: int
    frame: Parts
    replaceable: bool = False


Outcome = Buffer | CallFailure
IsGone = Callable[[Call], bool]

GONE_CHECK_S = 0.2
"""How often a wait for answers looks whether an actor has been replaced meanwhile."""


def never_gone(call: Call) -> bool:
    """Wait for every call's actor until the time is over."""
    return False


class PendingCalls(Protocol):
    """Calls that are under way."""

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """Return one outcome per call, in order, within the time that the calls were given.

        A call whose actor ``is_gone``, as is asked every ``GONE_CHECK_S``, is waited for no longer:
        its outcome is DIED. Never raises for an actor's failure. An answer that comes after the
        time is dropped. The answers may be views of memory that the transport's next wait uses
        again.
        """
        ...


class Transport(Protocol):
    """Carries frames to actors and brings their answers back; used from one thread."""

    calls: Counter[str]
    """How many calls went over which transport, ``ray`` or ``stream``."""

    def send(self, calls: Sequence[Call], timeout_s: float) -> PendingCalls:
        """Send all calls at once; ``timeout_s`` bounds the wait for all of their answers."""
        ...

    def renew(self, actor_id: str) -> None:
        """Trust no more what leads to this actor, since a frame was damaged on its way."""
        ...

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """Tell whether a call would go at once; where not, prepare for it without waiting.

        The first call to a new actor may take long; it can wait while there are other copies.
        """
        ...

    def close(self) -> None:
        """Drop connections and end threads, where there are any."""
        ...
