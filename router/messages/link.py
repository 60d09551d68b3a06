"""Connections between gateways and routers beside Serve's calls: checked frames over TCP.

A frame is a header of three 4-byte big-endian numbers, and a body, a msgpack array. The numbers are
the body's length, its CRC-32C, and the CRC-32C of the first two, so that no damage is taken for a
message or for a length. The first frame of a connection is the secret of the side that listens; its
:class:`LinkAddress` travels in Serve's calls. Both sides have TLS where the streams to the expert
actors have it.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import crc32c
import msgpack

from cluster.transport.stream.channel import prepare_tcp

CONNECT_TIMEOUT_S = 5.0
HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 1024
READ_BUFFER_BYTES = 256 << 10
_HEADER = struct.Struct(">III")
_CHECKED = struct.Struct(">II")
MALFORMED = (ValueError, TypeError, LookupError, AttributeError)
"""The errors of a frame whose body is not what the reader expects."""


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where one side listens, and the secret of the other side's first frame."""

    host: str
    port: int
    secret: str

    def to_wire(self) -> list[Any]:
        """Return it as plain data."""
        return [self.host, self.port, self.secret]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> LinkAddress:
        """Rebuild it from :meth:`to_wire`."""
        return cls(*wire)


async def read_frame(reader: asyncio.StreamReader, max_bytes: int) -> list[Any]:
    """Return the body of the next frame.

    Raises ``ConnectionError`` for a damaged frame, one over ``max_bytes`` and one that is no
    array, ``ValueError`` for a body that is no msgpack, and ``asyncio.IncompleteReadError`` at the
    connection's end.
    """
    header = await reader.readexactly(_HEADER.size)
    length, body_sum, header_sum = _HEADER.unpack(header)
    if crc32c.crc32c(header[: _CHECKED.size]) != header_sum:
        raise ConnectionError("a link frame came damaged")
    if length > max_bytes:
        raise ConnectionError(f"a link frame has {length} bytes; at most {max_bytes}")
    body = await reader.readexactly(length)
    if crc32c.crc32c(body) != body_sum:
        raise ConnectionError("a link frame came damaged")
    frame = msgpack.unpackb(body)
    if not isinstance(frame, list):
        raise ConnectionError("a link frame is not an array")
    return frame


def pack_frame(body: list[Any]) -> bytes:
    """Return a frame."""
    return framed(msgpack.packb(body))


def framed(packed: bytes) -> bytes:
    """Return the frame of a packed body."""
    checked = _CHECKED.pack(len(packed), crc32c.crc32c(packed))
    return checked + crc32c.crc32c(checked).to_bytes(4, "big") + packed


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LinkListener:
    """The side that listens: hands each connection with the right secret to ``serve``."""

    def __init__(self, host: str, serve: Serve, tls: ssl.SSLContext | None) -> None:
        """``host`` is the address that the other side can reach.

        ``serve`` reads and writes a connection until it ends, and closes it. ``tls`` encrypts.
        """
        self._host = host
        self._serve = serve
        self._tls = tls
        self._secret = secrets.token_hex(32)
        self._starting: asyncio.Task[asyncio.Server] | None = None

    async def start(self) -> LinkAddress:
        """Listen on a free port, unless it listens, and return the address for the other side."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._listen())
        server = await asyncio.shield(self._starting)  # other callers wait for it too
        return LinkAddress(self._host, server.sockets[0].getsockname()[1], self._secret)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(
            self._admit, self._host, 0, limit=READ_BUFFER_BYTES, ssl=self._tls
        )

    def close(self) -> None:
        """Stop listening; connections stay open."""
        if self._starting is not None and not self._starting.cancel():
            self._starting.result().close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await read_frame(reader, MAX_HELLO_BYTES)
            secret = hello[0] if len(hello) == 1 and isinstance(hello[0], str) else ""
            if not hmac.compare_digest(secret.encode(), self._secret.encode()):
                raise ConnectionError("its secret is wrong")
        except (OSError, asyncio.IncompleteReadError, *MALFORMED):
            writer.close()
            return
        prepare_tcp(writer.get_extra_info("socket"))
        await self._serve(reader, writer)


async def open_link(
    address: LinkAddress, tls: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the side that listens, and send it its secret; raises ``OSError``."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(
            address.host, address.port, limit=READ_BUFFER_BYTES, ssl=tls
        )
    prepare_tcp(writer.get_extra_info("socket"))
    writer.write(pack_frame([address.secret]))
    return reader, writer
