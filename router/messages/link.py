"""Connections between gateways and routers beside Serve's calls: checked frames over a socket.

Within a node it is a Unix socket. A process listens by TCP only once it has a peer on another node.

A frame is a header of three 4-byte big-endian numbers, and a body, a msgpack array. The numbers are
the body's length, its CRC-32C, and the CRC-32C of the first two, so that no damage is taken for a
message or for a length. The side that listens has a secret, which travels in Serve's calls with its
:class:`LinkAddress`. On a connection it never travels: each side proves first that it has the
secret, as on a stream (:mod:`cluster.transport.stream.handshake`). Over TCP both sides have TLS
where the streams to the expert actors have it; a Unix socket's bytes leave no node.

The side that listens begins: ``[nonce]``, ``[nonce, proof]``, ``[proof]``.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import crc32c
import msgpack

from cluster.transport.stream.handshake import NONCE_BYTES, PROOF_BYTES, Side, new_nonce, proof
from cluster.transport.stream.sockets import HAS_UNIX, leaves_host, listen_on, prepare_tcp

CONNECT_TIMEOUT_S = 5.0
HELLO_TIMEOUT_S = 5.0
"""How long a handshake may take, that of TLS included."""
MAX_GREETING = 256
"""The most connections of a listener that are in their handshake; one more ends the oldest."""
MAX_HELLO_BYTES = 1024
ACCEPT_RETRY_S = 1.0
"""The pause after the system had no room for a connection."""
READ_BUFFER_BYTES = 256 << 10
_HEADER = struct.Struct(">III")
_CHECKED = struct.Struct(">II")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
MALFORMED = (ValueError, TypeError, LookupError, AttributeError)
"""The errors of a frame whose body is not what the reader expects."""

logger = logging.getLogger("expertmesh.link")


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where one side listens, and the secret that both sides prove to have.

    ``node`` is Ray's id of its node. ``name`` is that of its Unix socket, for peers of this node;
    it is empty where there are no Unix sockets. Without a ``port`` no peer of another node can
    connect.
    """

    node: str
    secret: str = field(repr=False)
    name: bytes = b""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        """Return where a connection goes: ``unix``, or host and port; ``no socket`` for neither."""
        if self.name:
            return "unix"
        return f"{self.host}:{self.port}" if self.port else "no socket"

    @property
    def is_reachable(self) -> bool:
        """Whether there is any way to connect."""
        return bool(self.name or self.port)

    def seen_from(self, node: str) -> LinkAddress:
        """Return the address with the one way by which a peer of a node connects.

        That is the Unix socket for a peer of the same node, else TCP; there may be none. So a link
        to one peer has one address, also after that peer has begun to listen by TCP.
        """
        if self.name and node == self.node:
            return replace(self, host="", port=0)
        return replace(self, name=b"")

    def to_wire(self) -> list[Any]:
        """Return it as plain data."""
        return [self.node, self.secret, self.name, self.host, self.port]

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


async def read_until_end(
    connection: Connection, max_bytes: int, take: Callable[[list[Any]], None], name: str = ""
) -> Exception:
    """Hand the body of each frame to ``take``; closes the connection at its end, and returns why.

    A malformed frame ends it too. With a ``name``, any end but the other side's close is logged.
    """
    reader, writer = connection
    try:
        while True:
            take(await read_frame(reader, max_bytes))
    except (OSError, asyncio.IncompleteReadError, *MALFORMED) as error:
        if name and not isinstance(error, asyncio.IncompleteReadError):
            logger.warning("%s is closed: %s", name, error)
        return error
    finally:
        writer.close()


def pack_frame(body: list[Any]) -> bytes:
    """Return a frame."""
    return framed(msgpack.packb(body))


def framed(packed: bytes) -> bytes:
    """Return the frame of a packed body."""
    checked = _CHECKED.pack(len(packed), crc32c.crc32c(packed))
    return checked + crc32c.crc32c(checked).to_bytes(4, "big") + packed


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LinkListener:
    """The side that listens: hands each connection that has proved the secret to ``serve``.

    Any other is closed without effect, after :data:`HELLO_TIMEOUT_S` at the latest. When more than
    :data:`MAX_GREETING` are in their handshake, the oldest is closed: a stranger that opens many
    and says nothing keeps no router or gateway out, whose handshake takes milliseconds.
    """

    def __init__(
        self, node: str, host: str | None, serve: Serve, tls: ssl.SSLContext | None
    ) -> None:
        """``node`` is this node's id, ``host`` the address that other nodes can reach.

        With ``None`` for a host nobody of another node may connect. ``serve`` reads and writes a
        connection until it ends, and closes it. ``tls`` encrypts TCP.
        """
        self._host = host
        self._serve = serve
        self._tls = tls
        self._address = LinkAddress(node, secrets.token_hex(32))
        self._has_others = not HAS_UNIX
        """Whether any peer needs TCP."""
        self._is_closed = False
        self._accepting: list[asyncio.Task[None]] = []
        self._greeting: dict[asyncio.Task[None], None] = {}
        """The connections in their handshake, the oldest first."""
        self._connections: set[asyncio.Task[None]] = set()

    def expect(self, node: str) -> None:
        """Have a peer on a node: for one on another node, :meth:`start` listens by TCP from now on.

        Opens nothing itself, so that it cannot fail.
        """
        self._has_others |= node != self._address.node

    def start(self) -> LinkAddress:
        """Listen on what its peers need, unless it does or is closed, and return the address.

        Needs a running event loop. Raises ``OSError`` where no socket can be opened.
        """
        if self._is_closed:
            return self._address
        if HAS_UNIX and not self._address.name:
            self._address = replace(self._address, name=self._listen(None))
        if self._has_others and self._host is not None and not self._address.port:
            port = self._listen(self._host)[1]
            self._address = replace(self._address, host=self._host, port=port)
        return self._address

    def close(self) -> None:
        """Stop listening; connections stay open that have ended their handshake."""
        self._is_closed = True
        for task in (*self._accepting, *self._greeting):
            task.cancel()

    def _listen(self, host: str | None) -> Any:
        """Accept connections from now on; returns the name or the address of the socket."""
        listener = listen_on(host)
        self._accepting.append(asyncio.create_task(self._accept(listener)))
        return listener.getsockname()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except ConnectionError:  # the other side has closed it again
                    continue
                except OSError as error:
                    logger.warning("a link cannot be accepted (%s)", error)
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                self._begin(sock)
                await asyncio.sleep(0)  # the handshake begins before another can end it
        finally:
            listener.close()

    def _begin(self, sock: socket.socket) -> None:
        if len(self._greeting) >= MAX_GREETING:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._admit(sock))
        self._greeting[task] = None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda ended: self._greeting.pop(ended, None))

    async def _admit(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                connection = await _accepted(sock, self._tls)
                secret = self._address.secret.encode()
                await _end_unless(_challenge(*connection, secret), connection)
        except (OSError, EOFError, *MALFORMED):
            return
        self._greeting.pop(cast("asyncio.Task[None]", asyncio.current_task()), None)
        await self._serve(*connection)


async def open_link(address: LinkAddress, tls: ssl.SSLContext | None) -> Connection:
    """Connect to the side that listens, and prove to each other that both have the secret.

    The address is as :meth:`LinkAddress.seen_from` this node: a Unix socket comes first. ``tls``
    encrypts TCP. Raises ``OSError``, within :data:`CONNECT_TIMEOUT_S`.
    """
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await _connected(address, tls)
            await _end_unless(_respond(*connection, address.secret.encode()), connection)
    except OSError:
        raise
    except (EOFError, *MALFORMED) as error:
        raise ConnectionError(f"the handshake with {address} failed ({error})") from None
    return connection


async def _connected(address: LinkAddress, tls: ssl.SSLContext | None) -> Connection:
    """Return the streams of a new connection, before its handshake but after that of TLS."""
    if address.name:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # By the loop's own socket: uvloop ends a name at its first zero byte.
            await asyncio.get_running_loop().sock_connect(sock, address.name)
            return await asyncio.open_unix_connection(sock=sock, limit=READ_BUFFER_BYTES)
        except BaseException:
            sock.close()
            raise
    if not address.port:
        raise ConnectionRefusedError("it listens only for its own node")
    connection = await asyncio.open_connection(
        address.host, address.port, limit=READ_BUFFER_BYTES, ssl=tls
    )
    prepare_tcp(connection[1].get_extra_info("socket"))
    return connection


async def _accepted(sock: socket.socket, tls: ssl.SSLContext | None) -> Connection:
    """Return the streams of an accepted connection, after the handshake of TLS, if it is TCP."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_BUFFER_BYTES, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        if leaves_host(sock):
            prepare_tcp(sock)
        else:
            tls = None
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
    except BaseException:
        sock.close()
        raise
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _end_unless(handshake: Awaitable[None], connection: Connection) -> None:
    """Wait for a handshake; where it fails or is cancelled the connection ends at once."""
    try:
        await handshake
    except BaseException:
        connection[1].transport.abort()
        raise


async def _challenge(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> None:
    """Do the listening side's part of the handshake; raises where the other side's is wrong."""
    nonce = new_nonce()
    writer.write(pack_frame([nonce]))
    other_nonce, other_proof = await read_frame(reader, MAX_HELLO_BYTES)
    _check_length(other_nonce, NONCE_BYTES)
    _check_proof(other_proof, proof(secret, Side.LINK_CALLER, nonce, other_nonce))
    writer.write(pack_frame([proof(secret, Side.LINK_LISTENER, nonce, other_nonce)]))


async def _respond(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> None:
    """Do the connecting side's part of the handshake; raises where the other side's is wrong."""
    [other_nonce] = await read_frame(reader, MAX_HELLO_BYTES)
    _check_length(other_nonce, NONCE_BYTES)
    nonce = new_nonce()
    writer.write(pack_frame([nonce, proof(secret, Side.LINK_CALLER, other_nonce, nonce)]))
    [other_proof] = await read_frame(reader, MAX_HELLO_BYTES)
    _check_proof(other_proof, proof(secret, Side.LINK_LISTENER, other_nonce, nonce))


def _check_proof(given: object, expected: bytes) -> None:
    if not hmac.compare_digest(_check_length(given, PROOF_BYTES), expected):
        raise ConnectionError("the other side does not have the secret")


def _check_length(given: object, length: int) -> bytes:
    """Return the bytes of a handshake; raises ``ConnectionError`` for anything but so many."""
    if not isinstance(given, bytes) or len(given) != length:
        raise ConnectionError("the handshake of the other side is malformed")
    return given
