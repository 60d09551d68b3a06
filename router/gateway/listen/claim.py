"""Which application has a port of this machine, and the sockets that its gateways share there.

The first gateway that listens on an address also binds an abstract Unix socket with the address in
its name. Another gateway connects to it. If both are of one application, it gets the Unix socket
and the listening sockets (``SCM_RIGHTS``). From then on both accept what comes. So a gateway
that ends loses no connection, and another application cannot share a port by mistake. Abstract
names and ports belong to the same network namespace, and both are free as soon as no process has
the socket: a killed gateway leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from cluster.errors import ConfigError

BACKLOG = 1024
ANSWER_TIMEOUT_S, RETRY_S, CLAIM_TIMEOUT_S = 2.0, 0.05, 10.0
_MAX_NAME_BYTES, _MAX_SOCKETS, _BACKLOG = 512, 4, 64
_OWN, _OTHER = b"+", b"-"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)
MakeSockets = Callable[[], Sequence[socket.socket]]
"""Opens the listening sockets of an address; raises :class:`ConfigError` where it cannot."""


def resolved(host: str, where: str) -> str:
    """Return the numeric address of a host; ``where`` is its key in the deployment file.

    Raises :class:`ConfigError` for a name that stands for no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host} has no address ({error})", where) from None
    return str(found[0][4][0])


def open_socket(host: str, port: int, where: str, *, listens: bool) -> socket.socket:
    """Return a socket of a numeric address, for several processes to share.

    One that does not ``listens`` only holds the port: a gRPC server of this user may listen there
    by ``SO_REUSEPORT``, and nobody else may. Raises :class:`ConfigError` with the key ``where`` and
    the process that has the port.
    """
    try:
        return _opened(host, port, listens)
    except OSError as error:
        raise ConfigError(f"cannot use {port}: {_reason(host, port, error)}", where) from None


def why_taken(host: str, port: int) -> str | None:
    """Return why nobody can listen on a port of a host now, if so."""
    try:
        address = resolved(host, "")
        _opened(address, port, listens=True).close()
    except ConfigError as error:
        return error.message
    except OSError as error:
        return _reason(address, port, error)
    return None


def _opened(host: str, port: int, listens: bool) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if host == "::":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # A former server's connections that still close do not hold the port.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        if listens:
            made.listen(BACKLOG)
        else:  # Set before, it would share the port with a program that sets it, too.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    return made


async def wait_readable(one: socket.socket) -> None:
    """Return once a socket has something to read or to accept.

    A cancelled ``loop.sock_accept`` may lose the connection that it has accepted.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(one, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(one)


def holder_of(port: int) -> str:
    """Return the name and pid of the process that listens on a port, if this user may see it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.pid
            if listens and connection.laddr and connection.laddr.port == port:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"it is taken by {holder_of(port)}"
    if error.errno == errno.EACCES:
        return "this user may not open it"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine"
    return f"it cannot be opened on {host} ({error.strerror})"


class Claim:
    """An address that this process's application has; ``sockets`` listen there."""

    def __init__(
        self, application: str, lock: socket.socket, sockets: Sequence[socket.socket]
    ) -> None:
        self.sockets = tuple(sockets)
        self._application = application.encode()
        self._lock = lock
        self._answering = asyncio.create_task(self._answer(), name="claim")

    def close(self) -> None:
        """Answer nobody any more, and close the sockets; other gateways keep theirs."""
        if self._lock.fileno() < 0:
            return
        # While another gateway has the socket, a closed one would still wake this event loop.
        asyncio.get_running_loop().remove_reader(self._lock)
        self._answering.cancel()
        for one in (self._lock, *self.sockets):
            one.close()

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            peer, _ = await loop.sock_accept(self._lock)
            with peer, suppress(OSError, TimeoutError):
                peer.setblocking(False)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._answer_one(peer)

    async def _answer_one(self, peer: socket.socket) -> None:
        if uid_of(peer) != os.getuid():
            return
        asked = await asyncio.get_running_loop().sock_recv(peer, _MAX_NAME_BYTES)
        if asked == self._application:
            socket.send_fds(peer, [_OWN], [one.fileno() for one in (self._lock, *self.sockets)])
        else:
            peer.send(_OTHER + self._application)


async def claim(
    host: str, port: int, application: str, make: MakeSockets, key: str = "gateway.listen"
) -> Claim:
    """Return the claim of ``application`` on an address; needs a running event loop.

    Where no gateway has the address, ``make`` opens its sockets. Where a gateway of the same
    application has it, its sockets are shared. ``application`` names one deployment of one Ray
    cluster, in at most 511 bytes. Raises :class:`ConfigError`, with the port's ``key``, where
    another application has the address, and what ``make`` raises.
    """
    name = f"\0expertmesh-{os.getuid()}-{host}:{port}"
    where = f"port {port} of {host}"
    try:
        async with asyncio.timeout(CLAIM_TIMEOUT_S):
            while True:
                lock = _bound(name)
                if lock is not None:
                    try:
                        return Claim(application, lock, make())
                    except BaseException:
                        lock.close()
                        raise
                with suppress(ConnectionError, TimeoutError):  # its holder ends, or is busy
                    lock, *sockets = await _shared(name, application, where, key)
                    return Claim(application, lock, sockets)
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise ConfigError(
            f"{where}: the process that holds it did not answer within {CLAIM_TIMEOUT_S:g} s; "
            "end that process, or choose another port",
            key,
        ) from None


def uid_of(peer: socket.socket) -> int:
    """Return the user of a Unix socket's other end."""
    given = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(given)[1])


def _bound(name: str) -> socket.socket | None:
    """Return a socket that listens by this name, or ``None`` where another one does."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        lock.bind(name)
        lock.listen(_BACKLOG)
    except OSError:
        lock.close()
        return None
    return lock


async def _shared(name: str, application: str, where: str, key: str) -> list[socket.socket]:
    """Return the lock and the listening sockets of the gateway that has an address."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as peer:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await loop.sock_connect(peer, name)
            if uid_of(peer) != os.getuid():
                raise ConfigError(
                    f"{where} is held by another user's process; choose another port",
                    key,
                )
            await loop.sock_sendall(peer, application.encode())
            await wait_readable(peer)
            answer, descriptors, *_ = socket.recv_fds(peer, 1 + _MAX_NAME_BYTES, 1 + _MAX_SOCKETS)
    shared = [socket.socket(fileno=one) for one in descriptors]
    for one in shared:
        one.setblocking(False)
    if answer[:1] == _OWN and shared:
        return shared
    for one in shared:
        one.close()
    if not answer:
        raise ConnectionResetError(f"{where}: the process that held it exited")
    raise ConfigError(
        f"{where} is used by application {answer[1:].decode()}; this one is {application}; "
        "each application needs its own ports",
        key,
    )
