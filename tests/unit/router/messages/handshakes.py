"""The handshake of a link, written out by hand, and the event loops of the tests of links."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

import crc32c
import msgpack

from router.messages.link import LinkAddress

LIMIT_S = 60.0
new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
P = ParamSpec("P")


def looped(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run a test on an event loop of its own; what that loop reports is a failure."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        reported: list[dict[str, Any]] = []

        async def limited() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, what: reported.append(what))
            async with asyncio.timeout(2 * LIMIT_S):
                await test(*args, **kwargs)
            # What the end of the loop cancels is not of interest.
            loop.set_exception_handler(lambda _, what: None)

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(limited())
        assert reported == []

    return run


async def happens(condition: Callable[[], bool]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


def by_tcp(port: int, secret: str = "secret") -> LinkAddress:
    """Return the address of a side that listens on loopback by TCP alone."""
    return LinkAddress("node", secret, host="127.0.0.1", port=port)


def packed(body: bytes, length: int | None = None) -> bytes:
    """Return a frame of any body, whose header may claim another length."""
    checked = struct.pack(">II", len(body) if length is None else length, crc32c.crc32c(body))
    return checked + struct.pack(">I", crc32c.crc32c(checked)) + body


def framed(body: object) -> bytes:
    """Return a frame."""
    return packed(msgpack.packb(body))


def flipped(data: bytes, index: int) -> bytes:
    """Return it with one bit changed."""
    return data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]


async def connect(address: LinkAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect as a stranger does, that knows no more than where somebody listens."""
    kind = socket.AF_UNIX if address.name else socket.AF_INET
    sock = socket.socket(kind, socket.SOCK_STREAM)
    sock.setblocking(False)
    where = address.name or (address.host, address.port)
    await asyncio.get_running_loop().sock_connect(sock, where)
    if address.name:
        return await asyncio.open_unix_connection(sock=sock)
    return await asyncio.open_connection(sock=sock)


async def frame(reader: asyncio.StreamReader) -> Any:
    """Return the body of the next frame."""
    length, _, _ = struct.unpack(">III", await reader.readexactly(12))
    return msgpack.unpackb(await reader.readexactly(length))


def proved(secret: bytes, side: bytes, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    """Return a side's proof."""
    return hmac.new(secret, side + listener_nonce + caller_nonce, hashlib.sha256).digest()


async def listens(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> None:
    """Do the part of the side that listens."""
    nonce = b"\x01" * 16
    writer.write(framed([nonce]))
    caller_nonce, proof = await frame(reader)
    assert proof == proved(secret, b"link caller", nonce, caller_nonce)
    writer.write(framed([proved(secret, b"link listener", nonce, caller_nonce)]))


async def calls(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> tuple[bytes, bytes]:
    """Do the part of the side that connects; returns all that it sent and all that it got."""
    [listener_nonce] = await frame(reader)
    nonce = b"\x02" * 16
    sent = framed([nonce, proved(secret, b"link caller", listener_nonce, nonce)])
    writer.write(sent)
    [proof] = await frame(reader)
    assert proof == proved(secret, b"link listener", listener_nonce, nonce)
    return sent, framed([listener_nonce]) + framed([proof])
