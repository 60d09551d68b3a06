"""A router's end of the streams: the transport with an open connection to every actor.

A thread in the background makes the connections, because each takes a Ray call. The fall-back
transport sends a call whose connection is missing, broken or full, and a frame or an answer that is
too long for a stream.
"""

from __future__ import annotations

import logging
import math
import selectors
import time
from collections import Counter
from collections.abc import Sequence

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
from cluster.transport.stream.channel import Message
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.lanes import IdleConnections
from cluster.transport.stream.late import LATE_READ_S, wait_for_any
from cluster.transport.stream.link import Link

LAST_WAIT_MS = 5
"""The time for which a wait watches one actor before it watches all actors."""
WINDOW = 8
"""The most unanswered calls of one connection; further calls use the fall-back."""
PROMPT_S = 0.001
"""A wait that begins later than this after its calls first looks for the answers that are there."""
WAITED_S = 20e-6
"""An answer that is read so soon after its wait began may have been there before."""

logger = logging.getLogger("expertmesh.stream")


class StreamTransport:
    """Implements :class:`cluster.transport.base.Transport` over streams; for one thread."""

    def __init__(self, connector: Connector, fallback: Transport | None) -> None:
        """Without a ``fallback`` a call waits for its connection, and fails when it breaks."""
        self.calls: Counter[str] = Counter() if fallback is None else fallback.calls
        self._connector = connector
        self._fallback = fallback
        self._selector = selectors.DefaultSelector()
        self.links: dict[str, Link] = {}
        self._last_id = 0
        self._answers = 0
        self._changes = 0  # of the links and of what is under way on them
        self._lanes = IdleConnections([])
        self._lanes_of = 0
        self.waits_since_s = math.inf
        """When the latest wait for an answer began; infinite while reading without a wait."""

    def send(self, calls: Sequence[Call]) -> PendingCalls:
        """See :class:`Transport`.

        Calls without a connection are sent last, because they may wait for one. Before them, the
        actor that answered last gets its call first. On a host with few cores this thread runs on
        the core of the actor that answered first, so another actor's core is idle. An actor on the
        idle core starts at once; the actor on this thread's core starts when this thread waits.
        In the opposite order both actors would start on this core, one after the other.
        """
        pending = StreamCalls(self, calls)
        links = [self.links.get(call.actor_id) for call in calls]
        order = [1 if link is None else -link.last_answer for link in links]
        for index in sorted(range(len(calls)), key=order.__getitem__):
            self.send_one(pending, index, calls[index])
        return pending

    def send_one(self, pending: StreamCalls, index: int, call: Call) -> None:
        """Send a call over its actor's stream, or over the fall-back where that is not possible."""
        link = self._link(call.actor_id, call.generation, pending.until_s[index])
        if link is None:
            pending.fall_back(index, CallFailure.DIED)
        elif not self._has_room(link, pending):
            pending.fall_back(index, CallFailure.TIMED_OUT)
        else:
            self._send_over(link, pending, index, call)

    def _send_over(self, link: Link, pending: StreamCalls, index: int, call: Call) -> None:
        """Send a call over a connection; a call that is too long for a stream falls back."""
        self._last_id = call_id = self._last_id + 1
        try:
            is_sent = link.channel.send(call_id, call.frame)
        except OSError as error:
            self.break_off(link, error)
            pending.connection_broke(index)
        else:
            if is_sent:
                self.expect_answer(link, pending, index, call_id)
            else:
                pending.fall_back(index, CallFailure.TIMED_OUT)

    def expect_answer(self, link: Link, pending: StreamCalls, index: int, call_id: int) -> None:
        """Note that a connection owes the answer of a call that was sent."""
        if link.channel.outgoing:
            link.take_over(call_id)
        if not link.unanswered:
            link.waits_since_s = time.monotonic()
        self._changes += 1
        link.unanswered[call_id] = pending
        pending.unanswered[call_id] = index
        self.calls["stream"] += 1

    def lanes(self) -> IdleConnections:
        """Return the idle connections, over which native code may send and receive by itself.

        They are valid until this transport is used in another way. It drops answers that come
        meanwhile to calls of native code, unless :func:`take_over` makes them its own.
        """
        if self._lanes_of != self._changes:
            self._answers = max(self._answers, self._lanes.note_answers())
            links = [link for link in self.links.values() if not link.unanswered]
            if not self._lanes.are_of(links):
                self._lanes = IdleConnections(links)
            self._lanes.count_on(self._answers)
            self._lanes_of = self._changes
        return self._lanes

    def new_call_ids(self, count: int) -> int:
        """Return the first of so many ids of calls that native code sends."""
        first = self._last_id + 1
        self._last_id += count
        return first

    def receive_in_turn(self, waiting: StreamCalls, calls: Sequence[Call], until_s: float) -> None:
        """Wait for each actor in turn, the last called first, until an answer is late.

        When the last called actor answers, the others have mostly answered too, so that this thread
        wakes once for all of them. Meanwhile it notices no other connection that breaks.
        """
        for call_id, index in reversed(list(waiting.unanswered.items())):
            if call_id not in waiting.unanswered:  # already answered
                continue
            link = self.links.get(calls[index].actor_id)
            self.waits_since_s = now_s = time.monotonic()
            left_ms = int((until_s - now_s) * 1000)
            if link is None or left_ms <= 0 or not link.channel.can_wait:
                return
            if not self._receive_from(link, waiting, min(LAST_WAIT_MS, left_ms)):
                return

    def receive_any(self, waiting: StreamCalls, timeout_s: float) -> bool:
        """Wait for an answer of any actor, and store each answer with its calls.

        Returns whether any connection had bytes to read. A long answer takes several calls.
        """
        readable = [link for link in self.links.values() if link.channel.has_more]
        selected = self._selector.select(0 if readable else timeout_s)
        links = dict.fromkeys([*(key.data for key, _ in selected), *readable])
        for link in links:
            self._receive_from(link, waiting)
        return bool(links)

    def _receive_from(self, link: Link, waiting: StreamCalls, wait_ms: int = 0) -> bool:
        """Store the answers that a link has received with their calls; returns whether any has."""
        try:
            messages = link.channel.receive(wait_ms)
        except OSError as error:
            self.break_off(link, link.channel.failure or error)
            return True
        if messages:
            self.store(link, waiting, messages)
        return bool(messages)

    def store(self, link: Link, waiting: StreamCalls, messages: Sequence[Message]) -> None:
        """Store the answers of a link with their calls."""
        self._changes += 1
        link.waits_since_s = now_s = time.monotonic()
        is_awaited = now_s - self.waits_since_s > WAITED_S
        for call_id, frame in messages:
            pending = link.unanswered.pop(call_id, None)
            if link.writer is not None:
                link.forget(call_id)
            if pending is None:  # a late answer
                continue
            index = pending.unanswered.pop(call_id)
            if frame is None:
                pending.outcomes[index] = CallFailure.DAMAGED
            elif not len(frame):
                pending.fall_back(index, CallFailure.TIMED_OUT)
            elif pending is waiting and not link.unanswered:
                pending.outcomes[index] = frame
            else:  # a copy: the link's next answer overwrites the buffer
                pending.outcomes[index] = bytes(frame)
            if is_awaited:
                pending.answered_at_s[index] = now_s
        link.last_answer = self._answers = self._answers + 1
        # Where the next message begins is unknown too: the length may be the damaged part.
        if any(frame is None for _, frame in messages):
            self.break_off(link, ConnectionError("a message arrived corrupt"))

    def _link(self, actor_id: str, generation: int, until_s: float) -> Link | None:
        """Return the connection to an actor's generation; ``None`` if there is none yet.

        Without a fall-back it waits for one, until ``until_s`` at most.
        """
        link = self.links.get(actor_id)
        if link is not None:
            if link.generation == generation:
                return link
            self._drop(link)
        wait_s = 0.0 if self._fallback is not None else until_s - time.monotonic()
        channel = self._connector.take(actor_id, generation, wait_s)
        if channel is None:
            return None
        self._changes += 1
        link = self.links[actor_id] = Link(actor_id, generation, channel)
        self._selector.register(channel.sock, selectors.EVENT_READ, link)
        return link

    def _has_room(self, link: Link, pending: StreamCalls) -> bool:
        """Return whether a connection takes another call; late answers are read to make room."""
        if len(link.unanswered) < WINDOW:
            return True
        self.waits_since_s = math.inf
        self.receive_any(pending, 0.0)
        if len(link.unanswered) < WINDOW:
            return True
        if not any(link.unanswered.values()) and link.is_silent():
            self.break_off(link, TimeoutError("the actor answers no call"))
        return False

    def is_ready(self, actor_id: str, generation: int) -> bool:
        """See :class:`Transport`."""
        return self._link(actor_id, generation, 0.0) is not None  # no wait: 0 is long ago

    def renew(self, actor_id: str) -> None:
        """See :class:`Transport`: calls use the fall-back until a new connection is made."""
        if actor_id in self.links:
            self._drop(self.links[actor_id])

    def close(self) -> None:
        """See :class:`Transport`."""
        self._connector.close()
        for link in list(self.links.values()):
            self._drop(link)
        self._selector.close()
        if self._fallback is not None:
            self._fallback.close()

    def moved_at_s(self, call_id: int, call: Call) -> float:
        """See :meth:`Link.moved_at_s`."""
        link = self.links.get(call.actor_id)
        return float("-inf") if link is None else link.moved_at_s(call_id)

    def has_begun(self, call: Call) -> bool:
        """Return whether an answer of the call's actor has begun to arrive."""
        link = self.links.get(call.actor_id)
        return link is not None and link.channel.has_begun

    def forget(self, call_id: int, call: Call) -> None:
        """Drop the answer of a call when it arrives; replaces a connection that is silent."""
        link = self.links.get(call.actor_id)
        if link is not None and call_id in link.unanswered:
            link.unanswered[call_id] = None
            link.forget(call_id)
            if not any(link.unanswered.values()) and link.is_silent():
                self.break_off(link, TimeoutError("the actor answers no call"))

    def send_by_fallback(self, call: Call, timeout_s: float) -> PendingCalls | None:
        """Send a call over the fall-back; returns ``None`` without a fall-back."""
        return (
            None
            if self._fallback is None
            else self._fallback.send([call._replace(timeout_s=timeout_s)])
        )

    def break_off(self, link: Link, error: OSError) -> None:
        """Log why a connection broke, and drop it."""
        logger.info("the stream to %s g%d broke (%s)", link.actor_id, link.generation, error)
        self._drop(link)

    def _drop(self, link: Link) -> None:
        """Close a connection, unless it is closed; its unanswered calls fail or use the fall-back.

        The next call to the actor asks for a new connection.
        """
        if self.links.get(link.actor_id) is not link:
            return
        self._changes += 1
        del self.links[link.actor_id]
        self._selector.unregister(link.channel.sock)
        link.close()
        for call_id, pending in link.unanswered.items():
            if pending is not None:
                pending.connection_broke(pending.unanswered.pop(call_id))


class StreamCalls:
    """Pending calls over streams, and over the fall-back."""

    def __init__(
        self, transport: StreamTransport, calls: Sequence[Call], sent_at_s: float | None = None
    ) -> None:
        """Begin without any that is sent; ``sent_at_s`` is when the calls were, by default now."""
        self.unanswered: dict[int, int] = {}
        """The index in ``calls`` of each call that the streams have not answered, by its id."""
        self.outcomes: list[Outcome] = [CallFailure.TIMED_OUT] * len(calls)
        self._transport = transport
        self.calls = calls
        self.sent_at_s = now_s = time.monotonic() if sent_at_s is None else sent_at_s
        self.until_s = [min(now_s + call.timeout_s, call.end_s) for call in calls]
        """When the time of each call is over, unless bytes of it leave later."""
        self.took_s: float | None = None
        self.answered_at_s: dict[int, float] = {}
        """When each answer came that was waited for."""
        self._by_fallback: list[tuple[int, PendingCalls]] = []

    def wait(self, is_gone: IsGone = never_gone) -> list[Outcome]:
        """See :class:`PendingCalls`."""
        begun_at_s = time.monotonic()
        is_late = begun_at_s - self.sent_at_s > PROMPT_S
        were_there = is_late and self._read_arrived() and not self._by_fallback
        check_at_s = begun_at_s + GONE_CHECK_S
        until_s = min([check_at_s, *self.until_s])
        self._transport.receive_in_turn(self, self.calls, until_s)
        if self.unanswered:  # an answer is late
            wait_for_any(self, self._transport, is_gone, check_at_s)
        for index, pending in self._by_fallback:
            [self.outcomes[index]] = pending.wait(is_gone)
        self.took_s = None if were_there else time.monotonic() - self.sent_at_s
        return self.outcomes

    @property
    def times_s(self) -> dict[int, float]:
        """See :class:`PendingCalls`."""
        return {index: at_s - self.sent_at_s for index, at_s in self.answered_at_s.items()}

    def _read_arrived(self) -> bool:
        """Read what is there; returns whether all answers have arrived or begun to."""
        until_s = time.monotonic() + LATE_READ_S
        self._transport.waits_since_s = math.inf
        while self.unanswered and time.monotonic() < until_s:
            if not self._transport.receive_any(self, 0.0):
                break
        indices = self.unanswered.values()
        return all(self._transport.has_begun(self.calls[index]) for index in indices)

    def drop(self) -> None:
        """See :class:`PendingCalls`."""
        for call_id in list(self.unanswered):
            self.forget(call_id)
        for _, pending in self._by_fallback:
            pending.drop()
        self._by_fallback = []

    def forget(self, call_id: int) -> int:
        """Wait no longer for a call; returns its index."""
        index = self.unanswered.pop(call_id)
        self._transport.forget(call_id, self.calls[index])
        return index

    def connection_broke(self, index: int) -> None:
        """Set a replaceable call's outcome to DIED, and send any other over the fall-back."""
        if self.calls[index].replaceable:
            self.outcomes[index] = CallFailure.DIED
        else:
            self.fall_back(index, CallFailure.DIED)

    def fall_back(self, index: int, failure: CallFailure) -> None:
        """Send a call over the fall-back; without a fall-back its outcome is ``failure``."""
        call = self.calls[index]
        timeout_s = max(0.0, min(call.timeout_s, call.end_s - time.monotonic()))
        pending = self._transport.send_by_fallback(call, timeout_s)
        if pending is None:
            self.outcomes[index] = failure
        else:
            self._by_fallback.append((index, pending))
