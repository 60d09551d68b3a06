"""A router's end of the streams: the transport that holds a connection to every actor.

A connection is made in the background by a thread of its own, since it takes a Ray call; until it
is there, and whenever it breaks, is full, or cannot carry a frame, the same call goes over the
fall-back transport.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.frames import Buffer
from cluster.stream.channel import MAX_MESSAGE_BYTES, Channel
from cluster.stream.connect import Connector
from cluster.transport import (
    GONE_CHECK_S,
    Call,
    CallFailure,
    Flight,
    IsGone,
    Outcome,
    Transport,
    never_gone,
)

LAST_WAIT_MS = 5
"""So long only the actor that was asked last is waited for, once a flight. When its answer comes
those of the others are there mostly, and all are taken for one wake-up; but a connection that
breaks, or one to write to, is not seen meanwhile."""
WINDOW = 8
"""Unanswered calls on one connection; beyond it (an actor that hangs) calls go elsewhere."""

logger = logging.getLogger("expertmesh.stream")


@dataclass(slots=True, eq=False)
class _Link:
    """A connection to one generation of an actor, and the calls that it has not answered."""

    actor_id: str
    generation: int
    channel: Channel
    unanswered: set[int] = field(default_factory=set)
    answers_before: int = 0
    """How many answers of all connections had come when this one's latest came."""


class StreamTransport:
    """Implements :class:`cluster.transport.Transport` over streams; used from one thread."""

    def __init__(self, connector: Connector, fallback: Transport | None) -> None:
        """Without a ``fallback`` a call waits for its connection, and fails when it breaks."""
        self.calls: Counter[str] = Counter() if fallback is None else fallback.calls
        self._connector = connector
        self._fallback = fallback
        self._selector = selectors.DefaultSelector()
        self._links: dict[str, _Link] = {}
        self._flights: dict[int, _StreamFlight] = {}
        self._last_id = 0
        self._answers = 0

    def begin(self, calls: Sequence[Call], timeout_s: float) -> Flight:
        """See :class:`Transport`."""
        flight = _StreamFlight(self, calls, time.monotonic() + timeout_s)
        for place in self._in_order(calls):
            failure = self._send(flight, place, calls[place])
            if failure is not None:
                flight.send_elsewhere(place, failure)
        return flight

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """See :class:`Transport`."""
        return self._link(actor_id, generation, 0.0) is not None

    def _link(self, actor_id: str, generation: int, timeout_s: float) -> _Link | None:
        link = self._links.get(actor_id)
        if link is not None:
            if link.generation == generation:
                return link
            self._drop(link)
        patience_s = 0.0 if self._fallback is not None else timeout_s
        channel = self._connector.take(actor_id, generation, patience_s)
        if channel is None:
            return None
        link = self._links[actor_id] = _Link(actor_id, generation, channel)
        self._selector.register(channel.sock, selectors.EVENT_READ, link)
        return link

    def _in_order(self, calls: Sequence[Call]) -> list[int]:
        """Return the calls' places in the order in which they are best sent.

        Those that may have to wait for a connection come last. Of the others the actor that
        answered last comes first. On a host with few cores this thread wakes on the core of the one
        that was done first, so that only the other's own core idles. Sent the other way round, the
        first would be woken there and the second behind it, one after the other.
        """

        def key(place: int) -> int:
            link = self._links.get(calls[place].actor_id)
            return 1 if link is None else -link.answers_before

        return sorted(range(len(calls)), key=key) if len(calls) > 1 else [0] * len(calls)

    def renew(self, actor_id: str) -> None:
        """See :class:`Transport`: the next calls go elsewhere until there is a new connection."""
        if actor_id in self._links:
            self._drop(self._links[actor_id])

    def close(self) -> None:
        """See :class:`Transport`."""
        self._connector.close()
        for link in list(self._links.values()):
            self._drop(link)
        self._selector.close()
        if self._fallback is not None:
            self._fallback.close()

    def _send(self, flight: _StreamFlight, place: int, call: Call) -> CallFailure | None:
        """Send a call over its stream; tell what it comes to when that cannot be."""
        link = self._link(call.actor_id, call.generation, flight.remaining_s())
        if link is None:
            return CallFailure.DIED
        if len(link.unanswered) >= WINDOW:
            self._receive_any(flight, 0.0)  # late answers, which nobody has waited for
        if len(link.unanswered) >= WINDOW or sum(map(len, call.frame)) > MAX_MESSAGE_BYTES:
            return CallFailure.TIMED_OUT
        self._last_id = call_id = self._last_id + 1
        try:
            link.channel.send(call_id, call.frame)
        except OSError as error:
            self._lose(link, error)
            flight.lose(place)
            return None
        if link.channel.is_sending:
            self._watch(link)
        link.unanswered.add(call_id)
        self._flights[call_id] = flight
        flight.places[call_id] = place
        self.calls["stream"] += 1
        return None

    def _watch(self, link: _Link) -> None:
        events = selectors.EVENT_READ
        if link.channel.is_sending:
            events |= selectors.EVENT_WRITE
        self._selector.modify(link.channel.sock, events, link)

    def receive(self, waiting: _StreamFlight, timeout_s: float) -> None:
        """Wait for something to come, and give each answer to its flight."""
        wait_ms = min(LAST_WAIT_MS, int(timeout_s * 1000))
        actor_id = waiting.last_asked if wait_ms else None
        link = None if actor_id is None else self._links.get(actor_id)
        if link is not None and link.channel.can_wait:
            if self._receive_from(link, waiting, wait_ms):
                return
            waiting.last_asked_is_late = True
            timeout_s = max(0.0, timeout_s - wait_ms / 1000)
        self._receive_any(waiting, timeout_s)

    def _receive_any(self, waiting: _StreamFlight, timeout_s: float) -> None:
        """Wait for something to come from whomever, and give each answer to its flight."""
        pending = [link for link in self._links.values() if link.channel.has_more]
        links = {key.data: ev for key, ev in self._selector.select(0 if pending else timeout_s)}
        for link in pending:
            links.setdefault(link, selectors.EVENT_READ)
        for link, events in links.items():
            try:
                if link.channel.is_sending:
                    link.channel.flush()
                    if not link.channel.is_sending:
                        self._watch(link)
            except OSError as error:
                self._lose(link, error)
                continue
            if events & selectors.EVENT_READ:
                self._receive_from(link, waiting)

    def _receive_from(self, link: _Link, waiting: _StreamFlight, wait_ms: int = 0) -> bool:
        """Give each answer that has come over a link to its flight; return whether any has."""
        try:
            messages = link.channel.receive(wait_ms)
        except OSError as error:
            self._lose(link, error)
            return True
        for call_id, frame in messages:
            link.unanswered.discard(call_id)
            link.answers_before = self._answers
            self._answers += 1
            flight = self._flights.pop(call_id, None)
            if flight is None:  # the answer comes too late
                continue
            # What else comes over the link would overwrite an answer that is kept.
            is_safe = flight is waiting and not link.unanswered
            flight.take(call_id, frame if is_safe else bytes(frame))
        return bool(messages)

    def forget(self, call_ids: Sequence[int]) -> None:
        """Wait no longer for these calls' answers."""
        for call_id in call_ids:
            self._flights.pop(call_id, None)

    def elsewhere(self, call: Call, timeout_s: float) -> Flight | None:
        """Send a call over the fall-back, if there is one."""
        return None if self._fallback is None else self._fallback.begin([call], timeout_s)

    def _lose(self, link: _Link, error: OSError) -> None:
        """Give up a broken connection; its unanswered calls are lost or go elsewhere."""
        logger.info("the stream to %s g%d broke (%s)", link.actor_id, link.generation, error)
        self._drop(link)

    def _drop(self, link: _Link) -> None:
        if self._links.get(link.actor_id) is not link:
            return
        del self._links[link.actor_id]
        self._selector.unregister(link.channel.sock)
        link.channel.close()
        for call_id in link.unanswered:
            flight = self._flights.pop(call_id, None)
            if flight is not None:
                flight.lose(flight.places.pop(call_id))


class _StreamFlight:
    """Calls under way; what the streams do not carry is under way over the fall-back."""

    def __init__(
        self, transport: StreamTransport, calls: Sequence[Call], deadline_s: float
    ) -> None:
        self.places: dict[int, int] = {}
        self.last_asked_is_late = False
        """Whether it was waited for already."""
        self._transport = transport
        self._calls = calls
        self._deadline_s = deadline_s
        self._outcomes: list[Outcome] = [CallFailure.TIMED_OUT] * len(calls)
        self._elsewhere: list[tuple[int, Flight]] = []

    @property
    def last_asked(self) -> str | None:
        """The actor that was asked last of those without an answer, unless it was waited for."""
        if self.last_asked_is_late or not self.places:
            return None
        return self._calls[next(reversed(self.places.values()))].actor_id

    def remaining_s(self) -> float:
        """Return the seconds left; negative when the time is over."""
        return self._deadline_s - time.monotonic()

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`Flight`."""
        check_s = time.monotonic() + GONE_CHECK_S
        while self.places:
            now_s = time.monotonic()
            if now_s >= check_s:
                self._give_up(is_gone)
                check_s = now_s + GONE_CHECK_S
                continue
            # When the time is over too: what came while this process did not run still counts.
            self._transport.receive(self, max(0.0, min(self._deadline_s, check_s) - now_s))
            if now_s >= self._deadline_s:
                break
        self._transport.forget(list(self.places))
        for place, other in self._elsewhere:
            [self._outcomes[place]] = other.wait(is_gone)
        return self._outcomes

    def _give_up(self, is_gone: IsGone) -> None:
        """Wait no longer for the answers of actors that are gone."""
        lost = [call_id for call_id, place in self.places.items() if is_gone(self._calls[place])]
        self._transport.forget(lost)
        for call_id in lost:
            self._outcomes[self.places.pop(call_id)] = CallFailure.DIED

    def take(self, call_id: int, answer: Buffer) -> None:
        """Keep an answer; one of no bytes says that the stream cannot carry it."""
        place = self.places.pop(call_id)
        if len(answer):
            self._outcomes[place] = answer
        else:
            self.send_elsewhere(place, CallFailure.TIMED_OUT)

    def lose(self, place: int) -> None:
        """Take it that a call's connection broke: tell of it, or send the call elsewhere."""
        if self._calls[place].replaceable:
            self._outcomes[place] = CallFailure.DIED
        else:
            self.send_elsewhere(place, CallFailure.DIED)

    def send_elsewhere(self, place: int, failure: CallFailure) -> None:
        """Send a call over the fall-back; without one, its outcome is ``failure``."""
        other = self._transport.elsewhere(self._calls[place], max(0.0, self.remaining_s()))
        if other is None:
            self._outcomes[place] = failure
        else:
            self._elsewhere.append((place, other))
