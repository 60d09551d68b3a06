"""How a router's frames reach expert actors: the transport interface, and the one over Ray calls.

A transport only carries bytes. It tells an actor that is gone from one that does not answer in
time; what to do about either is the dispatcher's business.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from cluster.spec import ACTOR_NAMESPACE, actor_name


class CallFailure(enum.StrEnum):
    """Why a call brought no frame back."""

    DIED = "died"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Call:
    """One frame for one generation of one actor."""

    actor_id: str
    generation: int
    frame: bytes


class Transport(Protocol):
    """Carries frames to actors and brings their answers back."""

    def call(self, calls: Sequence[Call], timeout_s: float) -> list[bytes | CallFailure]:
        """Send all calls at once and wait for their answers, at most ``timeout_s`` altogether.

        Returns one outcome per call, in order; never raises for an actor's failure. An answer
        that comes after the time is dropped.
        """
        ...


class RayTransport:
    """One Ray actor call per frame. Works everywhere; must be used from one thread."""

    def __init__(self, app: str) -> None:
        """``app`` is the Serve application whose actors are called."""
        self._app = app
        self._handles: dict[str, tuple[int, ActorHandle]] = {}

    def call(self, calls: Sequence[Call], timeout_s: float) -> list[bytes | CallFailure]:
        """See :class:`Transport`."""
        deadline_s = time.monotonic() + timeout_s
        outcomes: list[bytes | CallFailure] = [CallFailure.DIED] * len(calls)
        refs, places = [], []
        for place, call in enumerate(calls):
            handle = self._handle(call)
            if handle is not None:
                refs.append(handle.compute.remote(call.frame))
                places.append(place)
        try:
            answers = ray.get(refs, timeout=timeout_s)
        except RayError:
            answers = [_outcome(ref, deadline_s) for ref in refs]
        for place, answer in zip(places, answers, strict=True):
            outcomes[place] = answer
            if answer is CallFailure.DIED:
                # A controller that never knew this one may give its generation to another.
                self._handles.pop(calls[place].actor_id, None)
        return outcomes

    def _handle(self, call: Call) -> ActorHandle | None:
        generation, handle = self._handles.get(call.actor_id, (0, None))
        if handle is not None and generation == call.generation:
            return handle
        name = actor_name(self._app, call.actor_id, call.generation)
        try:
            handle = ray.get_actor(name, namespace=ACTOR_NAMESPACE)
        except ValueError:  # Ray knows no living actor of this name
            return None
        self._handles[call.actor_id] = (call.generation, handle)
        return handle


def _outcome(ref: ray.ObjectRef, deadline_s: float) -> bytes | CallFailure:
    try:
        answer: bytes = ray.get(ref, timeout=max(0.0, deadline_s - time.monotonic()))
        return answer
    except GetTimeoutError:
        return CallFailure.TIMED_OUT
    except RayError:
        return CallFailure.DIED
