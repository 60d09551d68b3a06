"""The sockets of streams: how they listen, and what the system is asked for."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
from functools import cache

SEND_BUFFER_BYTES = 4 << 20
"""What a Unix socket holds, if the system allows so much: the frames of a prefill's pieces, which a
peer that computes does not read yet. A system's default holds less than one."""
HAS_UNIX = hasattr(socket, "AF_UNIX")
PORTS_VARIABLE = "EXPERTMESH_PORTS"
"""The variable that has the ports between machines, which ``args.ports`` sets."""
_BACKLOG = 128

logger = logging.getLogger("expertmesh.stream")


def leaves_host(sock: socket.socket) -> bool:
    """Return whether a socket is one between hosts; a Unix socket stays on its host."""
    return not HAS_UNIX or sock.family != socket.AF_UNIX


def listen_on(host: str | None) -> socket.socket:
    """Return a socket that listens at a free port of ``host``, or only for this host.

    The port is one of :data:`PORTS_VARIABLE`, where that is set. For ``None`` it is a Unix socket
    with an abstract name, which leaves no file behind when the process is killed. Raises
    ``OSError``.
    """
    if host is None:
        name = b"\0expertmesh-" + secrets.token_hex(16).encode()
        return _listening(socket.AF_UNIX, name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    given = os.environ.get(PORTS_VARIABLE, "")
    for port in ports_of(given) if given else (0,):
        try:
            return _listening(family, (host, port))
        except OSError as error:
            if not given or error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"all ports of {given} are in use at {host}")


def ports_of(text: str) -> range:
    """Return the ports of a range such as ``20000-20999``; raises ``ValueError``."""
    first, _, last = text.partition("-")
    ports = range(int(first), int(last) + 1)
    if not ports or not 0 < ports[0] <= ports[-1] < 2**16:
        raise ValueError(f"must be a range of ports, as 20000-20999; got {text}")
    return ports


def _listening(family: int, where: bytes | tuple[str, int]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(where)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def prepare_unix(sock: socket.socket) -> None:
    """Let the socket hold :data:`SEND_BUFFER_BYTES`, or as much as the system allows."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    granted_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    if granted_bytes < SEND_BUFFER_BYTES:
        _log_small_buffer(granted_bytes)


@cache
def _log_small_buffer(granted_bytes: int) -> None:
    """Log once that the system allows smaller buffers than asked for."""
    logger.info(
        "the system limits a socket's send buffer to %d of %d wanted bytes; longer frames leave "
        "in several parts (net.core.wmem_max on Linux)",
        granted_bytes,
        SEND_BUFFER_BYTES,
    )


def prepare_tcp(sock: socket.socket) -> None:
    """Send without delay, and detect a dead host within seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 2),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 5000),
    ):
        if hasattr(socket, name):  # some systems lack some options
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
