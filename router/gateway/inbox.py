"""What has come for one request of a gateway, until its stream has room for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cluster.errors import DeadlineExceededError
from router.messages.request import GenerationRequest, TokenEvent

MAX_BUFFERED_EVENTS = 100_000


Reply = BaseException | dict[str, Any]


class Inbox:
    """What has come for one request: token events in order, and in the end the call's reply.

    Events gather here while the reader is busy with those that it took last: until the client has
    room for them.
    """

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._loop = asyncio.get_running_loop()
        self._events: list[TokenEvent] = []
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Take one event; the reader is woken at once when it is a choice's end, or in its time."""
        if len(self._events) >= MAX_BUFFERED_EVENTS:  # what is left out comes with the reply
            return
        self._events.append(event)
        if event.finish_reason is not None or self._loop.time() >= self._due_s:
            self._changed.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._changed.set)

    def end(self, reply: Reply) -> None:
        """Take the call's reply or the error that it ended with; the reader is woken at once."""
        self._reply = reply
        self._changed.set()

    async def take(self, pause_s: float) -> tuple[list[TokenEvent], Reply | None]:
        """Wait for events or the reply; return all events that have come, and the reply if it has.

        Events that follow are held back for ``pause_s``, so that they are returned together.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due_s = self._loop.time() + pause_s
        events, self._events = self._events, []
        return events, self._reply


async def put_reply(call: Any, inbox: Inbox) -> None:
    try:
        inbox.end(await call)
    except Exception as error:
        inbox.end(error)


async def take_events(
    inbox: Inbox, request: GenerationRequest, pause_s: float
) -> tuple[list[TokenEvent], Reply | None]:
    # A moment past the deadline, so that the router's own word on it comes first.
    timeout_s = max(0.0, request.deadline_s - time.time()) + 1.0
    try:
        async with asyncio.timeout(timeout_s):
            return await inbox.take(pause_s)
    except TimeoutError:
        raise DeadlineExceededError("the request's deadline passed") from None
