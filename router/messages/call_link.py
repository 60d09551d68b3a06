"""The call link: one connection from a gateway to each router, for calls beside Serve's.

A call over it takes a fraction of the time of Serve's. The router listens; its address comes by a
call of Serve's (:mod:`router.gateway.upstream.router_links`). A call is ``[number, request]``, and
``[number, None]`` cancels it. Every call gets one frame ``[number, reply]``, ``None`` for a
cancelled one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import ray

from cluster.errors import InternalError
from cluster.tls import TlsFiles, ray_is_encrypted
from router.messages.link import (
    Connection,
    LinkAddress,
    LinkListener,
    open_link,
    pack_frame,
    read_until_end,
)

MAX_FRAME_BYTES = 1 << 30
SILENT_S = 2.0
"""A router that owes answers and has sent none for so long is called last."""

logger = logging.getLogger("expertmesh.link")

Wire = Mapping[str, Any]
LinkCall = asyncio.Future[Wire]
"""A call under way: await it for the reply, or cancel it."""


class LinkBrokenError(Exception):
    """The connection to a router ended before its answer came: the call may be made again."""


class CallServer:
    """A router's end of its links; used on the replica's event loop."""

    def __init__(
        self,
        node: str,
        host: str | None,
        serve: Callable[[Wire], Awaitable[Wire]],
        tls: ssl.SSLContext | None,
    ) -> None:
        """``node`` is this node's id, ``host`` the address that gateways of other nodes can reach.

        With ``None`` for a host they get no link. ``serve`` maps a request to its reply or its
        typed error; a cancellation ends the request.
        """
        self._answer_of = serve
        self._listener = LinkListener(node, host, self._serve, tls)
        self._writers: dict[asyncio.StreamWriter, None] = {}

    async def start(self, node: str) -> LinkAddress:
        """Listen for gateways of a node, unless it does; returns the address as they see it.

        It has no way to connect where they are on another node and get no link.
        """
        self._listener.expect(node)
        return self._listener.start().seen_from(node)

    def close(self) -> None:
        """Stop listening and drop the connections; gateways ask other routers then."""
        self._listener.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: dict[int, asyncio.Task[bytes]] = {}

        def answer(number: int, call: asyncio.Task[bytes]) -> None:
            del calls[number]
            if not writer.is_closing():
                writer.write(pack_frame([number, None]) if call.cancelled() else call.result())

        def take(body: list[Any]) -> None:
            number, wire = body
            if wire is not None:
                if number in calls:
                    raise ConnectionError("the number of a call came twice")
                calls[number] = asyncio.create_task(self._answer(number, wire))
                calls[number].add_done_callback(partial(answer, number))
            elif number in calls:
                calls[number].cancel()

        self._writers[writer] = None
        try:
            await read_until_end((reader, writer), MAX_FRAME_BYTES, take, "a gateway's link")
        finally:
            self._writers.pop(writer, None)
            for call in calls.values():
                call.cancel()

    async def _answer(self, number: int, wire: Wire) -> bytes:
        try:
            return pack_frame([number, await self._answer_of(wire)])
        except Exception:
            logger.exception("a call failed")
            return pack_frame([number, {"error": InternalError("the router failed").to_wire()}])


def call_server(serve: Callable[[Wire], Awaitable[Wire]], tls: TlsFiles | None) -> CallServer:
    """Return the server of a router on this node; see :class:`CallServer`.

    Other nodes get no link where Ray's own calls are encrypted and such a connection would not be.
    """
    is_plain = tls is None and ray_is_encrypted()
    host = None if is_plain else ray.util.get_node_ip_address()
    context = None if tls is None else tls.server_context()
    return CallServer(ray.get_runtime_context().get_node_id(), host, serve, context)


class CallLink:
    """A gateway's connection to one router; used only on its event loop."""

    def __init__(self, connection: Connection) -> None:
        """Take over a connection that :func:`router.messages.link.open_link` made."""
        self._writer = connection[1]
        self._numbers = itertools.count()
        self._answers: dict[int, LinkCall] = {}
        self._is_leaving = False
        self._waits_since_s = 0.0
        self.called_at_s = 0.0
        """When the latest call was made (monotonic)."""
        self._reading = asyncio.create_task(self._read(connection))

    @classmethod
    async def open(cls, address: LinkAddress, tls: ssl.SSLContext | None) -> CallLink:
        """Connect to a router; raises ``OSError``."""
        return cls(await open_link(address, tls))

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return not (self._is_leaving or self._writer.is_closing())

    @property
    def num_unanswered(self) -> int:
        """The calls without an answer, with those that were cancelled."""
        return len(self._answers)

    def is_silent(self) -> bool:
        """Return whether calls have waited for any answer for :data:`SILENT_S`."""
        return bool(self._answers) and time.monotonic() - self._waits_since_s >= SILENT_S

    def call(self, wire: Wire) -> LinkCall:
        """Send a request to the router, and return its reply to come; the link must be open.

        The router ends a call that is cancelled. A call fails by :class:`LinkBrokenError`.
        """
        number = next(self._numbers)
        self.called_at_s = time.monotonic()
        if not self._answers:
            self._waits_since_s = self.called_at_s
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(partial(self._end_cancelled, number))
        self._writer.write(pack_frame([number, wire]))
        return answer

    def _end_cancelled(self, number: int, answer: LinkCall) -> None:
        if answer.cancelled() and not self._writer.is_closing():
            self._writer.write(pack_frame([number, None]))

    def leave(self) -> None:
        """Take no more calls, and close the connection after the last answer."""
        self._is_leaving = True
        if not self._answers:
            self._writer.close()

    def close(self) -> None:
        """Close the connection at once; calls without an answer fail."""
        self._writer.close()

    def _take(self, body: list[Any]) -> None:
        number, reply = body
        answer = self._answers.pop(number)
        self._waits_since_s = time.monotonic()
        if not answer.done():
            answer.set_result(reply)
        if self._is_leaving and not self._answers:
            self._writer.close()

    async def _read(self, connection: Connection) -> None:
        reason: Exception | None = None
        try:
            reason = await read_until_end(connection, MAX_FRAME_BYTES, self._take)
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(LinkBrokenError(f"a router's link broke ({reason!r})"))
            self._answers.clear()
