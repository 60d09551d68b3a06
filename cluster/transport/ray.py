"""Frames to expert actors as Ray calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from cluster.spec import ACTOR_NAMESPACE, actor_name
from cluster.transport.base import (
    GONE_CHECK_S,
    Call,
    CallFailure,
    IsGone,
    Outcome,
    PendingCalls,
    never_gone,
)
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.wire.checksum import sealed, unsealed
from cluster.wire.frames import joined


class RayTransport:
    """Sends each frame as one Ray call; for one thread."""

    def __init__(self, actors: RayActors) -> None:
        """``actors`` looks up the actors' handles."""
        self.calls: Counter[str] = Counter()
        self._actors = actors

    def send(self, calls: Sequence[Call]) -> PendingCalls:
        """See :class:`Transport`."""
        self.calls["ray"] += len(calls)
        return _RayCalls(self._actors, calls, [self._sent(call) for call in calls])

    def _sent(self, call: Call) -> ray.ObjectRef | CallFailure:
        try:
            handle = self._actors.handle(call.actor_id, call.generation)
        except RayError:  # Ray's control store is away
            return CallFailure.UNREACHABLE
        return (
            CallFailure.DIED
            if handle is None
            else handle.compute.remote(joined(sealed(call.frame)))
        )

    def renew(self, actor_id: str) -> None:
        """See :class:`Transport`; Ray keeps the connections."""

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """See :class:`Transport`; Ray queues a call until its actor is there."""
        return True

    def close(self) -> None:
        """See :class:`Transport`; Ray keeps the connections."""


class _RayCalls:
    def __init__(
        self,
        actors: RayActors,
        calls: Sequence[Call],
        refs: Sequence[ray.ObjectRef | CallFailure],
    ) -> None:
        self._actors = actors
        self._calls = calls
        self._refs = refs
        self._sent_at_s = time.monotonic()
        self.took_s: float | None = None
        self.times_s: dict[int, float] = {}  # Ray says when all answers are there, not when each

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`PendingCalls`."""
        both = zip(self._calls, self._refs, strict=True)
        sent = [(call, ref) for call, ref in both if not isinstance(ref, CallFailure)]
        try:
            left_s = min((self._remaining_s(call) for call, _ in sent), default=0.0)
            refs = [ref for _, ref in sent]
            answers: list[Outcome] = ray.get(refs, timeout=min(left_s, GONE_CHECK_S))
        except RayError:
            answers = [self._outcome(call, ref, is_gone) for call, ref in sent]
        self.took_s = time.monotonic() - self._sent_at_s
        remaining = map(_unsealed, answers)
        outcomes = [r if isinstance(r, CallFailure) else next(remaining) for r in self._refs]
        for call, outcome in zip(self._calls, outcomes, strict=True):
            if outcome is CallFailure.DIED:
                # A new controller that does not know this actor may give the same generation to a
                # successor.
                self._actors.forget(call.actor_id)
        return outcomes

    def drop(self) -> None:
        """See :class:`PendingCalls`; Ray keeps no answer without a reference."""
        self._refs = []

    def _remaining_s(self, call: Call) -> float:
        until_s = min(self._sent_at_s + call.timeout_s, call.end_s)
        return max(0.0, until_s - time.monotonic())

    def _outcome(self, call: Call, ref: ray.ObjectRef, is_gone: IsGone) -> Outcome:
        while True:
            remaining_s = self._remaining_s(call)
            try:
                answer: bytes = ray.get(ref, timeout=min(remaining_s, GONE_CHECK_S))
                return answer
            except GetTimeoutError:
                if is_gone(call, time.monotonic() - self._sent_at_s):
                    return CallFailure.DIED
                if remaining_s == 0:
                    return CallFailure.TIMED_OUT
            except ActorUnavailableError:
                return CallFailure.UNREACHABLE
            except RayError:
                return CallFailure.DIED


def _unsealed(answer: Outcome) -> Outcome:
    if isinstance(answer, CallFailure):
        return answer
    frame = unsealed(answer)
    return CallFailure.DAMAGED if frame is None else frame


class RayActors:
    """Looks up the expert actors of one application by name; safe for several threads."""

    def __init__(self, app: str) -> None:
        """``app`` is the name of the Serve application."""
        self._app = app
        self._handles: dict[str, tuple[int, ActorHandle]] = {}

    def handle(self, actor_id: str, generation: int) -> ActorHandle | None:
        """Return the handle of one generation of an actor, or ``None`` without a living actor.

        Raises ``RayError`` while Ray's control store is away.
        """
        known_generation, handle = self._handles.get(actor_id, (0, None))
        if handle is not None and known_generation == generation:
            return handle
        name = actor_name(self._app, actor_id, generation)
        try:
            handle = ray.get_actor(name, namespace=ACTOR_NAMESPACE)
        except ValueError:  # Ray knows no living actor of this name
            return None
        self._handles[actor_id] = (generation, handle)
        return handle

    def forget(self, actor_id: str) -> None:
        """Look up the actor again at its next call."""
        self._handles.pop(actor_id, None)

    def offer(
        self, actor_id: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer | None:
        """Ask an actor for a stream; ``None`` without an answer in time."""
        try:
            handle = self.handle(actor_id, generation)
            if handle is None:
                return None
            offer: StreamOffer = ray.get(handle.offer_stream.remote(network), timeout=timeout_s)
            return offer
        except RayError:
            return None
