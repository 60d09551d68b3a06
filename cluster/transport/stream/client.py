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

from cluster.transport.base import (
    GONE_CHECK_S,
    Call,
    CallFailure,
    IsGone,
    Outcome,
    PendingCalls,
    Transport,
    never_gone,
)
from cluster.transport.stream.channel import Channel
from cluster.transport.stream.connect import Connector

LAST_WAIT_MS = 5
"""How long a wait watches one actor alone before it watches all of them."""
WINDOW = 8
"""Unanswered calls on one connection; beyond it (an actor that hangs) calls go elsewhere."""

logger = logging.getLogger("expertmesh.stream")


@dataclass(slots=True, eq=False)
class _Link:
    """A connection to one generation of an actor, and the calls that it has not answered."""

    actor_id: str
    generation: int
    channel: Channel
    unanswered: dict[int, _StreamCalls | None] = field(default_factory=dict)
    """By the id of the call; ``None`` where nobody waits any longer."""
    answers_before: int = 0
    """How many times answers had come, over any connection, when this one's latest came."""


class StreamTransport:
    """Implements :class:`cluster.transport.base.Transport` over streams; used from one thread."""

    def __init__(self, connector: Connector, fallback: Transport | None) -> None:
        """Without a ``fallback`` a call waits for its connection, and fails when it breaks."""
        self.calls: Counter[str] = Counter() if fallback is None else fallback.calls
        self._connector = connector
        self._fallback = fallback
        self._selector = selectors.DefaultSelector()
        self._links: dict[str, _Link] = {}
        self._last_id = 0
        self._answers = 0

    def send(self, calls: Sequence[Call], timeout_s: float) -> PendingCalls:
        """See :class:`Transport`.

        Those that may have to wait for a connection are sent last. Of the others the actor that
        answered last comes first. On a host with few cores this thread wakes on the core of the one
        that was done first, so that only the other's own core idles. Sent the other way round, the
        first would be woken there and the second behind it, one after the other.
        """
        pending = _StreamCalls(self, calls, time.monotonic() + timeout_s)
        links = [self._links.get(call.actor_id) for call in calls]
        turns = [1 if link is None else -link.answers_before for link in links]
        for place in sorted(range(len(calls)), key=turns.__getitem__):
            failure = self._send(pending, place, calls[place])
            if failure is not None:
                pending.send_elsewhere(place, failure)
        return pending

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

    def _send(self, pending: _StreamCalls, place: int, call: Call) -> CallFailure | None:
        """Send a call over its stream; tell what it comes to when that cannot be."""
        link = self._links.get(call.actor_id)
        if link is None or link.generation != call.generation:
            link = self._link(call.actor_id, call.generation, pending.remaining_s())
            if link is None:
                return CallFailure.DIED
        if len(link.unanswered) >= WINDOW:
            self.receive_any(pending, 0.0)  # late answers, which nobody has waited for
            if len(link.unanswered) >= WINDOW:
                return CallFailure.TIMED_OUT
        channel = link.channel
        self._last_id = call_id = self._last_id + 1
        try:
            if not channel.send(call_id, call.frame):
                return CallFailure.TIMED_OUT
        except OSError as error:
            self._lose(link, error)
            pending.lose(place)
            return None
        if channel.outgoing:
            self._watch(link)
        link.unanswered[call_id] = pending
        pending.places[call_id] = place
        self.calls["stream"] += 1
        return None

    def _watch(self, link: _Link) -> None:
        events = selectors.EVENT_READ
        if link.channel.outgoing:
            events |= selectors.EVENT_WRITE
        self._selector.modify(link.channel.sock, events, link)

    def receive_in_turn(self, waiting: _StreamCalls, calls: Sequence[Call], until_s: float) -> None:
        """Wait for the actor that was asked last, and so on, until one's answer is late.

        When the last one's answer comes those of the others are there mostly, and all are taken for
        one wake-up; but a connection that breaks, or one to write to, is not seen meanwhile.
        """
        for call_id, place in reversed(list(waiting.places.items())):
            if call_id not in waiting.places:  # its answer came with another's
                continue
            link = self._links.get(calls[place].actor_id)
            left_ms = int((until_s - time.monotonic()) * 1000)
            if link is None or left_ms <= 0 or not link.channel.can_wait:
                return
            if not self._receive_from(link, waiting, min(LAST_WAIT_MS, left_ms)):
                return

    def receive_any(self, waiting: _StreamCalls, timeout_s: float) -> None:
        """Wait for an answer of any actor, and give each answer to its calls."""
        readable = [link for link in self._links.values() if link.channel.has_more]
        links = {key.data: ev for key, ev in self._selector.select(0 if readable else timeout_s)}
        for link in readable:
            links.setdefault(link, selectors.EVENT_READ)
        for link, events in links.items():
            try:
                if link.channel.outgoing:
                    link.channel.flush()
                    if not link.channel.outgoing:
                        self._watch(link)
            except OSError as error:
                self._lose(link, error)
                continue
            if events & selectors.EVENT_READ:
                self._receive_from(link, waiting)

    def _receive_from(self, link: _Link, waiting: _StreamCalls, wait_ms: int = 0) -> bool:
        """Give each answer that has come over a link to its calls; return whether any has."""
        try:
            messages = link.channel.receive(wait_ms)
        except OSError as error:
            self._lose(link, error)
            return True
        for call_id, frame in messages:
            pending = link.unanswered.pop(call_id, None)
            if pending is None:  # the answer comes too late
                continue
            place = pending.places.pop(call_id)
            if not len(frame):
                pending.send_elsewhere(place, CallFailure.TIMED_OUT)
            elif pending is waiting and not link.unanswered:
                pending.outcomes[place] = frame
            else:  # what else comes over the link would overwrite it
                pending.outcomes[place] = bytes(frame)
        if messages:
            link.answers_before = self._answers = self._answers + 1
        return bool(messages)

    def forget(self, call_id: int, call: Call) -> None:
        """Wait no longer for a call's answer."""
        link = self._links.get(call.actor_id)
        if link is not None and call_id in link.unanswered:
            link.unanswered[call_id] = None

    def elsewhere(self, call: Call, timeout_s: float) -> PendingCalls | None:
        """Send a call over the fall-back, if there is one."""
        return None if self._fallback is None else self._fallback.send([call], timeout_s)

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
        for call_id, pending in link.unanswered.items():
            if pending is not None:
                pending.lose(pending.places.pop(call_id))


class _StreamCalls:
    """Calls under way; what the streams do not carry is under way over the fall-back."""

    def __init__(
        self, transport: StreamTransport, calls: Sequence[Call], deadline_s: float
    ) -> None:
        self.places: dict[int, int] = {}
        """Of the calls that the streams have not answered: by id, where among all they stand."""
        self.outcomes: list[Outcome] = [CallFailure.TIMED_OUT] * len(calls)
        self._transport = transport
        self._calls = calls
        self._deadline_s = deadline_s
        self._elsewhere: list[tuple[int, PendingCalls]] = []

    def remaining_s(self) -> float:
        """Return the seconds left; negative when the time is over."""
        return self._deadline_s - time.monotonic()

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`PendingCalls`."""
        check_s = time.monotonic() + GONE_CHECK_S
        self._transport.receive_in_turn(self, self._calls, min(self._deadline_s, check_s))
        while self.places:
            now_s = time.monotonic()
            if now_s >= check_s:
                self._give_up(is_gone)
                check_s = now_s + GONE_CHECK_S
                continue
            # When the time is over too: what came while this process did not run still counts.
            self._transport.receive_any(self, max(0.0, min(self._deadline_s, check_s) - now_s))
            if now_s >= self._deadline_s:
                break
        for call_id in list(self.places):
            self._forget(call_id)
        for place, other in self._elsewhere:
            [self.outcomes[place]] = other.wait(is_gone)
        return self.outcomes

    def _give_up(self, is_gone: IsGone) -> None:
        """Wait no longer for the answers of actors that are gone."""
        lost = [call_id for call_id, place in self.places.items() if is_gone(self._calls[place])]
        for call_id in lost:
            self.outcomes[self._forget(call_id)] = CallFailure.DIED

    def _forget(self, call_id: int) -> int:
        """Wait no longer for a call; returns where it stands."""
        place = self.places.pop(call_id)
        self._transport.forget(call_id, self._calls[place])
        return place

    def lose(self, place: int) -> None:
        """Take it that a call's connection broke: tell of it, or send the call elsewhere."""
        if self._calls[place].replaceable:
            self.outcomes[place] = CallFailure.DIED
        else:
            self.send_elsewhere(place, CallFailure.DIED)

    def send_elsewhere(self, place: int, failure: CallFailure) -> None:
        """Send a call over the fall-back; without one, its outcome is ``failure``."""
        other = self._transport.elsewhere(self._calls[place], max(0.0, self.remaining_s()))
        if other is None:
            self.outcomes[place] = failure
        else:
            self._elsewhere.append((place, other))
