"""The token link: one connection from a router to each gateway, one frame per engine step.

A gateway listens; its address travels with each request's call (:mod:`router.messages.link`). The
link carries tokens early, and the call's reply has all of them again, so a broken link delays a
stream and loses nothing. It also carries "a step of this request alone begins" and "has ended",
which the call's reply has not. No request waits for a connection: it is made in the background, and
the tokens of its first moments are sent once it is there. In the other direction the link carries
"this choice needs no more tokens".
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any

from router.messages.link import (
    LinkAddress,
    LinkListener,
    open_link,
    pack_frame,
    read_until_end,
)
from router.messages.request import TokenEvent

MAX_FRAME_BYTES = 16 << 20
MAX_BUFFERED_BYTES = 8 << 20
UNREACHABLE_S = 10.0
"""How long a gateway that could not be reached is not tried again."""
SENT_TIMEOUT_S, SENT_CHECK_S = 0.5, 0.001
"""How long a message may take to leave this process, and how often it is looked at."""

logger = logging.getLogger("expertmesh.link")

OnTokens = Callable[[str, TokenEvent], bool]
OnAlone = Callable[[str, bool], None]
OnStop = Callable[[str, int], None]


class TokenReceiver:
    """The gateway's end of its links: hands each token event to ``on_tokens(request_id, event)``.

    ``on_tokens`` returns whether the request is under way; the server keeps nothing of others.
    """

    def __init__(
        self,
        node: str,
        host: str,
        on_tokens: OnTokens,
        on_alone: OnAlone,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``node`` is this node's id, ``host`` the address that routers of other nodes can reach.

        ``on_alone(request_id, is_alone)`` is called when a router begins or has ended a step of a
        request alone.
        """
        self._on_tokens = on_tokens
        self._on_alone = on_alone
        self._listener = LinkListener(node, host, self._serve, tls)
        self._routes: dict[str, asyncio.StreamWriter] = {}

    def expect(self, node: str) -> None:
        """Have routers on a node; one on another node can connect after the next :meth:`start`.

        Until a gateway knows of a router on a node that came later, requests reach that router by
        Serve's calls alone. It logs that the gateway is not reached, and their tokens come with the
        reply.
        """
        self._listener.expect(node)

    async def start(self) -> LinkAddress:
        """Listen, unless it listens, and return the address for routers, whatever their node."""
        return self._listener.start()

    def close(self) -> None:
        """Stop listening and drop the connections."""
        self._listener.close()
        for writer in dict.fromkeys(self._routes.values()):
            writer.close()

    def stop_choice(self, request_id: str, index: int) -> None:
        """Ask the router of a request to end one choice; does nothing where no link is open."""
        writer = self._routes.get(request_id)
        if writer is not None and not writer.is_closing():
            writer.write(pack_frame(["stop", request_id, index]))

    def forget(self, request_id: str) -> None:
        """Drop the route of a request that has ended."""
        self._routes.pop(request_id, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def take(events: list[Any]) -> None:
            for request_id, wire in events:
                if isinstance(wire, bool):
                    self._on_alone(request_id, wire)
                elif self._on_tokens(request_id, TokenEvent.from_wire(wire)):
                    self._routes[request_id] = writer

        try:
            await read_until_end((reader, writer), MAX_FRAME_BYTES, take, "a router's link")
        finally:
            self._routes = {r: w for r, w in self._routes.items() if w is not writer}


class TokenSender:
    """The router's end of all its links; used on the replica's event loop."""

    def __init__(self, on_stop: OnStop, tls: ssl.SSLContext | None = None) -> None:
        """``on_stop(request_id, index)`` is called when a gateway ends a choice."""
        self._on_stop = on_stop
        self._tls = tls
        self._links: dict[LinkAddress, asyncio.StreamWriter] = {}
        self._unsent: dict[LinkAddress, bytearray] = {}
        """The frames for each gateway to which a connection is being made."""
        self._unreachable_until_s: dict[LinkAddress, float] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}

    def connect(self, address: LinkAddress) -> None:
        """Begin to link to a gateway, unless there is a link, or it was just found unreachable."""
        now_s = time.monotonic()
        is_unreachable = self._unreachable_until_s.get(address, now_s) > now_s
        if is_unreachable or self._is_linked(address) or address in self._unsent:
            return
        self._unsent[address] = bytearray()
        task = asyncio.create_task(self._open(address))
        self._tasks[task] = None
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))

    async def _open(self, address: LinkAddress) -> None:
        """Connect, send what has been waiting for the connection, and read until its end."""
        try:
            connection = await open_link(address, self._tls)
        except OSError as error:
            text = "no link to a gateway (%s, %r); its tokens come with the reply"
            logger.warning(text, address, error)
            now_s = time.monotonic()
            latest = self._unreachable_until_s.items()
            self._unreachable_until_s = {a: until_s for a, until_s in latest if until_s > now_s}
            self._unreachable_until_s[address] = now_s + UNREACHABLE_S
            return
        finally:
            unsent = self._unsent.pop(address)
        writer = self._links[address] = connection[1]
        writer.write(unsent)
        try:
            await read_until_end(connection, MAX_FRAME_BYTES, self._take)
        finally:
            if self._links.get(address) is writer:
                del self._links[address]

    def _take(self, body: list[Any]) -> None:
        kind, request_id, index = body
        if kind == "stop":
            self._on_stop(request_id, index)

    async def send_alone(self, address: LinkAddress, request_id: str, is_alone: bool) -> bool:
        """Tell a gateway that a step of its request alone begins, or has ended.

        Returns whether the message has left this process, and so outlives it.
        """
        until_s = time.monotonic() + SENT_TIMEOUT_S
        while address in self._unsent and time.monotonic() < until_s:  # the connection is coming
            await asyncio.sleep(SENT_CHECK_S)
        writer = self._links.get(address)
        if writer is None or writer.is_closing():
            return False
        writer.write(pack_frame([[request_id, is_alone]]))
        while not writer.is_closing() and time.monotonic() < until_s:
            if not writer.transport.get_write_buffer_size():
                return True
            await asyncio.sleep(SENT_CHECK_S)
        return False

    def _is_linked(self, address: LinkAddress) -> bool:
        writer = self._links.get(address)
        return writer is not None and not writer.is_closing()

    def send(self, address: LinkAddress, events: list[tuple[str, TokenEvent]]) -> None:
        """Send the events of a step to the gateway of their requests; drops them without a link.

        While the connection is being made they wait for it. A gateway that does not read is cut
        off, which bounds the memory that it costs.
        """
        unsent = self._unsent.get(address)
        if unsent is not None:
            self._keep(unsent, b"".join(_frames_of(events)))
            return
        writer = self._links.get(address)
        if writer is None or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            logger.warning("a gateway does not read its link; the link is cut")
            writer.transport.abort()
            return
        for frame in _frames_of(events):
            writer.write(frame)

    def _keep(self, unsent: bytearray, frame: bytes) -> None:
        """Keep a frame until the connection is there; beyond the bound, frames are dropped.

        The reply has the tokens of all of them.
        """
        unsent += frame
        if len(unsent) > MAX_BUFFERED_BYTES:
            logger.warning("a gateway is slow to connect; its tokens come with the reply")
            unsent.clear()

    def close(self) -> None:
        """Drop all links, and end the attempts to connect."""
        for task in self._tasks:
            task.cancel()
        for writer in self._links.values():
            writer.close()


def _frames_of(events: list[tuple[str, TokenEvent]]) -> list[bytes]:
    """Return the frames of a step: one, but for events too large for one frame of a gateway's.

    A single event that is too large is left out; the reply has it.
    """
    frame = pack_frame([[request_id, event.to_wire()] for request_id, event in events])
    if len(frame) <= MAX_FRAME_BYTES:
        return [frame]
    if len(events) == 1:
        logger.warning("an event of %d bytes comes only with the reply", len(frame))
        return []
    half = len(events) // 2
    return [*_frames_of(events[:half]), *_frames_of(events[half:])]
