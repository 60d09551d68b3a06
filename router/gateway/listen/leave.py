"""Closes a gRPC server's listening socket without the loss of a connection.

grpcio closes it with the connections that it has not accepted, and the system resets these. So the
socket gets no new ones first, and is then closed in grpcio's place.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Collection
from contextlib import ExitStack, suppress

import psutil

SETTLE_S = 0.3
"""How long handshakes with clients take at most; clients send a lost SYN again after 1 s."""
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of Linux
# Of a TCP segment, byte 13 has the flags, and 2 is SYN: keep nothing of it. All of any other.
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_QUEUED_AT = 24  # tcpi_unacked of tcp_info: of a listening socket, how many wait to be accepted
_POLL_S = 0.02


def listening_on(port: int) -> set[int]:
    """Return the descriptors with which this process listens on a port."""
    opened = psutil.Process().net_connections("tcp")
    return {one.fd for one in opened if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


async def leave(descriptors: Collection[int], timeout_s: float) -> None:
    """Close the listening sockets of ``descriptors``, once nothing waits there.

    New connections go to the other processes that share the port, some after a second. Those that
    are open stay. What still waits after ``timeout_s`` is reset.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + timeout_s
    with ExitStack() as stack:
        found = {number: stack.enter_context(_same(number)) for number in descriptors}
        for one in found.values():
            _refuse_syns(one)
        await asyncio.sleep(min(timeout_s, SETTLE_S))
        while any(_queued(one) for one in found.values()) and loop.time() < until_s:
            await asyncio.sleep(_POLL_S)
        # grpcio goes on to use its number, and would write an error if it were no socket's.
        with socket.socket() as unused:
            for number in found:
                os.dup2(unused.fileno(), number, inheritable=False)


def _same(number: int) -> socket.socket:
    """Return the socket of a descriptor, by another one."""
    return socket.socket(fileno=os.dup(number))


def _refuse_syns(listening: socket.socket) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_SYN)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(held))
    with suppress(OSError):  # Where the system has no filters, what comes now may be reset.
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def _queued(listening: socket.socket) -> int:
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUED_AT + 4)
    return int(struct.unpack_from("I", info, _QUEUED_AT)[0])
