"""Opens the sockets of a gateway's addresses, or says why that cannot be."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress

import psutil

from cluster.errors import ConfigError

BACKLOG = 1024


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
