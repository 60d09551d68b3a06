"""The token link: one connection from a router to each gateway, one frame per engine step.

A gateway listens; its address and secret travel with each request's call. The link carries tokens
early, and the call's reply has all of them again, so a broken link delays a stream and loses
nothing. In the other direction the link carries "this choice needs no more tokens".

A frame is a 4-byte big-endian length and a msgpack array.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from router.messages.request import TokenEvent

MAX_FRAME_BYTES = 16 << 20
MAX_HELLO_BYTES = 1024
MAX_BUFFERED_BYTES = 8 << 20
CONNECT_TIMEOUT_S = 5.0
HELLO_TIMEOUT_S = 5.0
_LENGTH = struct.Struct(">I")
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError)
"""The errors of unpacking a malformed frame."""

logger = logging.getLogger("expertmesh.link")


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a gateway listens for routers, and the secret of a router's first frame."""

    host: str
    port: int
    secret: str


async def _read_frame(reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> list[Any]:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > max_bytes:
        raise ConnectionError(f"a link frame has {length} bytes; at most {max_bytes}")
    frame = msgpack.unpackb(await reader.readexactly(length))
    if not isinstance(frame, list):
        raise ConnectionError("a link frame is not an array")
    return frame


def _pack_frame(body: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(body)
    return _LENGTH.pack(len(packed)) + packed


OnTokens = Callable[[str, TokenEvent], bool]
OnStop = Callable[[str, int], None]


class LinkServer:
    """The gateway's end of its links: hands each token event to ``on_tokens(request_id, event)``.

    ``on_tokens`` returns whether the request is under way; the server keeps nothing of others.
    """

    def __init__(self, host: str, on_tokens: OnTokens) -> None:
        """``host`` is the address that routers can reach; :meth:`start` opens a free port."""
        self._host = host
        self._secret = secrets.token_hex(32)
        self._on_tokens = on_tokens
        self._server: asyncio.Server | None = None
        self._routes: dict[str, asyncio.StreamWriter] = {}

    async def start(self) -> LinkAddress:
        """Listen, and return the address for routers."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return LinkAddress(self._host, port, self._secret)

    def close(self) -> None:
        """Stop listening and drop the connections."""
        if self._server is not None:
            self._server.close()
        for writer in set(self._routes.values()):
            writer.close()

    def stop_choice(self, request_id: str, index: int) -> None:
        """Ask the router of a request to end one choice; does nothing where no link is open."""
        writer = self._routes.get(request_id)
        if writer is not None and not writer.is_closing():
            writer.write(_pack_frame(["stop", request_id, index]))

    def forget(self, request_id: str) -> None:
        """Drop the route of a request that has ended."""
        self._routes.pop(request_id, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await _read_frame(reader, MAX_HELLO_BYTES)
            secret = hello[0] if len(hello) == 1 and isinstance(hello[0], str) else ""
            if not hmac.compare_digest(secret.encode(), self._secret.encode()):
                raise ConnectionError("its secret is wrong")
            while True:
                for request_id, wire in await _read_frame(reader):
                    if self._on_tokens(request_id, TokenEvent.from_wire(wire)):
                        self._routes[request_id] = writer
        except (OSError, asyncio.IncompleteReadError, TimeoutError, *_MALFORMED) as error:
            if not isinstance(error, asyncio.IncompleteReadError):
                logger.warning("a router's link is closed: %s", error)
        finally:
            for request_id in [r for r, w in self._routes.items() if w is writer]:
                self._routes.pop(request_id)
            writer.close()


class LinkClient:
    """The router's end of all its links; used on the replica's event loop."""

    def __init__(self, on_stop: OnStop) -> None:
        """``on_stop(request_id, index)`` is called when a gateway ends a choice."""
        self._on_stop = on_stop
        self._links: dict[LinkAddress, asyncio.StreamWriter] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._connecting = asyncio.Lock()

    async def connect(self, address: LinkAddress) -> None:
        """Link to a gateway; returns without a link when the gateway cannot be reached."""
        if self._is_linked(address):  # before the lock, which another gateway may hold up
            return
        async with self._connecting:
            if self._is_linked(address):
                return
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(address.host, address.port)
            except (OSError, TimeoutError) as error:
                logger.warning("no link to a gateway (%s); its tokens come with the reply", error)
                return
            writer.write(_pack_frame([address.secret]))
            self._links[address] = writer
            task = asyncio.create_task(self._read_stops(address, reader, writer))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    def _is_linked(self, address: LinkAddress) -> bool:
        writer = self._links.get(address)
        return writer is not None and not writer.is_closing()

    def send(self, address: LinkAddress, events: list[tuple[str, TokenEvent]]) -> None:
        """Send the events of a step to the gateway of their requests; drops them without a link.

        A gateway that does not read is cut off, which bounds the memory that it costs.
        """
        writer = self._links.get(address)
        if writer is None or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            logger.warning("a gateway does not read its link; the link is cut")
            writer.transport.abort()
            return
        writer.write(_pack_frame([[request_id, e.to_wire()] for request_id, e in events]))

    def close(self) -> None:
        """Drop all links."""
        for writer in self._links.values():
            writer.close()

    async def _read_stops(
        self, address: LinkAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while True:
                kind, request_id, index = await _read_frame(reader)
                if kind == "stop":
                    self._on_stop(request_id, index)
        except (OSError, asyncio.IncompleteReadError, *_MALFORMED):
            writer.close()
        finally:
            if self._links.get(address) is writer:
                del self._links[address]
