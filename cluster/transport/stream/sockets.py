"""The sockets of streams: how they listen, and what the system is asked for."""

from __future__ import annotations

import logging
import secrets
import socket
from functools import cache

SEND_BUFFER_BYTES = 4 << 20
"""What a Unix socket holds, if the system allows so much: the frames of a prefill's pieces, which a
peer that computes does not read yet. A system's default holds less than one."""
HAS_UNIX = hasattr(socket, "AF_UNIX")
_BACKLOG = 128

logger = logging.getLogger("expertmesh.stream")


def leaves_host(sock: socket.socket) -> bool:
    """Return whether a socket is one between hosts; a Unix socket stays on its host."""
    return not HAS_UNIX or sock.family != socket.AF_UNIX


def listen_on(host: str | None) -> socket.socket:
    """Return a socket that listens at a free port of ``host``, or for this host alone.

    For ``None`` it is a Unix socket with an abstract name, which leaves no file behind when the
    process is killed. Raises ``OSError``.
    """
    where: bytes | tuple[str, int]
    if host is None:
        family, where = socket.AF_UNIX, b"\0expertmesh-" + secrets.token_hex(16).encode()
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        where = (host, 0)
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
