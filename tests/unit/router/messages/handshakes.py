"""The handshake of a link, written out by hand: what a side sends, and a client to send it with."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import struct
from typing import Any

import crc32c
import msgpack

from router.messages.link import LinkAddress


def by_tcp(port: int, secret: str = "secret") -> LinkAddress:
    """Return the address of a side that listens on loopback by TCP alone."""
    return LinkAddress("node", secret, host="127.0.0.1", port=port)


def framed(body: object) -> bytes:
    """Return a frame."""
    packed = msgpack.packb(body)
    lengths = struct.pack(">II", len(packed), crc32c.crc32c(packed))
    return lengths + struct.pack(">I", crc32c.crc32c(lengths)) + packed


async def connect(
    address: LinkAddress,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
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
