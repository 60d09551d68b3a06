"""The inbox of a request in a gateway: its tokens, until its client has room for them."""

from __future__ import annotations

import asyncio
from typing import Any

from router.messages.request import TokenEvent

MAX_BUFFERED_EVENTS = 100_000
Reply = BaseException | dict[str, Any]


class Inbox:
    """The token events of one request in their order, and at the end the call's reply.

    Events gather here while the reader is busy.
    """

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._loop = asyncio.get_running_loop()
        self._events: list[TokenEvent] = []
        self._due_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Take one event; wakes the reader after its pause, or at once at the end of a choice."""
        if len(self._events) >= MAX_BUFFERED_EVENTS:  # the reply repeats the dropped events
            return
        self._events.append(event)
        if event.finish_reason is not None:
            self._changed.set()
        elif self._timer is None:
            if self._loop.time() >= self._due_at_s:
                self._changed.set()
            else:
                self._timer = self._loop.call_at(self._due_at_s, self._changed.set)

    def end(self, reply: Reply) -> None:
        """Take the call's reply, or the error that ended it, and wake the reader at once."""
        self._reply = reply
        self._changed.set()

    def expire(self, error: Exception) -> None:
        """Give up the call for want of time, unless it has ended; what it gave comes first."""
        if self._reply is None:
            self.end(error)

    async def take(self, pause_s: float) -> tuple[list[TokenEvent], Reply | None]:
        """Wait; returns all events so far, and the reply or ``None`` while there is none.

        The caller bounds the wait: it has :meth:`expire` called at the deadline. Later events are
        held back to the next multiple of ``pause_s``, so that the next call returns them together.
        The readers of all requests are woken at the same time: the loop, the sockets and the
        clients then have one burst of work, and the engine's processes are disturbed once.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = self._loop.time()
        self._due_at_s = (now_s // pause_s + 1) * pause_s if pause_s > 0 else now_s
        events, self._events = self._events, []
        return events, self._reply


async def put_reply(call: Any, inbox: Inbox) -> None:
    """Wait for a router's call, and put its reply or its error into the inbox."""
    try:
        inbox.end(await call)
    except Exception as error:
        inbox.end(error)
