"""Targets: the token link and the call link between routers and gateways, at both ends.

Bytes that begin with :data:`CHECKED` are sent as a frame's body, so that they pass its checksum.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np

from benchmarks.fuzzing.target import Target
from cluster.transport.stream.handshake import PROOF_BYTES, Side, new_nonce, proof
from router.messages.call_link import CallLink, CallServer, LinkBrokenError, Wire
from router.messages.link import (
    LinkAddress,
    LinkListener,
    framed,
    open_link,
    pack_frame,
    read_frame,
)
from router.messages.prediction import PredictionReply, PredictionRequest
from router.messages.request import TokenEvent, TokenLogprobs
from router.messages.token_link import TokenReceiver, TokenSender

LIMIT_S = 10.0
MAX_HELLO_BYTES = 1024
SECRET = b"secret"
NODE = "node"
EVENT = TokenEvent(1, (5, 6), (TokenLogprobs(-0.5, (5,), (-0.5,)),) * 2, "stop", False, 3)
CHECKED = b"\xff"


def sent(data: bytes) -> bytes:
    """Return the bytes to send for some input."""
    return framed(data[1:]) if data.startswith(CHECKED) else data


def seeds(*bodies: list[Any]) -> list[bytes]:
    """Return good inputs: frames, and bodies alone."""
    frames = [pack_frame(body) for body in bodies]
    return [*frames, b"".join(frames), *(CHECKED + msgpack.packb(body) for body in bodies)]


def link() -> Target:
    """Return the target; a router with the secret sends the bytes, and so does a gateway."""

    def run(data: bytes) -> None:
        # They outlive the loop, as a router's does: one that is collected takes its tasks with it.
        clients = [TokenSender(lambda request_id, index: None) for _ in range(2)]
        asyncio.run(_without_faults(_tokens(sent(data), *clients)))

    events = [["a", EVENT.to_wire()], ["b", EVENT.to_wire()]]
    return Target(seeds(events, ["stop", "a", 1], ["0" * 64]), run)


def call_link() -> Target:
    """Return the target; a gateway with the secret sends the bytes, and so does a router."""

    def run(data: bytes) -> None:
        asyncio.run(_without_faults(_predictions(sent(data))))

    wire = PredictionRequest("r", "m", {"x": np.ones((2, 3), "<f4")}, ("y",), 1.0).to_wire()
    reply = PredictionReply({"y": np.ones((2, 1), "<f4")}, True, "i").to_wire()
    return Target(seeds([0, wire], [0, None], [0, {"reply": reply}]), run)


def handshake() -> Target:
    """Return the target; somebody without the secret sends the bytes, and so does a listener."""

    def run(data: bytes) -> None:
        asyncio.run(_without_faults(_handshakes(sent(data))))

    nonce, shown = new_nonce(), bytes(PROOF_BYTES)
    return Target(seeds([nonce], [nonce, shown], [shown]), run)


async def _handshakes(data: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("bytes without the secret were taken for a proof")

    listener = LinkListener(NODE, "127.0.0.1", serve, None)
    reader, writer = await connect(listener.start().name)
    writer.write(data)
    writer.write_eof()
    with suppress(ConnectionError):
        await reader.read()  # until it is cut off
    writer.close()
    listener.close()
    impostor, told = await _listener(data, knows=False)
    try:
        await open_link(impostor, None)
    except OSError:
        await told.wait()
        return
    raise AssertionError("bytes without the secret were taken for a proof")


async def _without_faults(work: Awaitable[None]) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    async with asyncio.timeout(LIMIT_S):
        await work
    assert not faults, f"nobody took {faults[0]}"


async def _tokens(data: bytes, honest: TokenSender, fooled: TokenSender) -> None:
    await _to_gateway(data, honest)
    await _to_router(data, fooled)


async def _predictions(data: bytes) -> None:
    async def predict(wire: Wire) -> Wire:
        request = PredictionRequest.from_wire(wire)
        return {"reply": PredictionReply(request.inputs, True, "i").to_wire()}

    logging.getLogger("expertmesh.link").setLevel(logging.CRITICAL)  # a failure is logged whole
    server = CallServer(NODE, "127.0.0.1", predict, None)
    address = await server.start(NODE)
    reader, writer = await _trusted(address)
    writer.write(data)
    writer.write_eof()
    await reader.read()  # until it is cut off
    writer.close()
    honest = await CallLink.open(address, None)
    rows = {"x": np.arange(6, dtype="<f4").reshape(2, 3)}
    call = honest.call(PredictionRequest("honest", "m", rows, ("y",), 1.0).to_wire())
    outputs = PredictionReply.from_wire((await call)["reply"]).outputs
    assert np.array_equal(outputs["x"], rows["x"])
    honest.close()
    server.close()
    fooled, told = await _listener(data)
    link = await CallLink.open(fooled, None)
    with suppress(LinkBrokenError):
        await link.call({"request_id": "r"})
    link.close()
    await told.wait()


async def connect(name: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a Unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, name)
    return await asyncio.open_unix_connection(sock=sock)


async def _trusted(address: LinkAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and prove to have the secret."""
    reader, writer = await connect(address.name)
    [nonce] = await read_frame(reader, MAX_HELLO_BYTES)
    own = new_nonce()
    secret = address.secret.encode()
    writer.write(pack_frame([own, proof(secret, Side.LINK_CALLER, nonce, own)]))
    assert await read_frame(reader, MAX_HELLO_BYTES) == [
        proof(secret, Side.LINK_LISTENER, nonce, own)
    ]
    return reader, writer


async def _listener(data: bytes, knows: bool = True) -> tuple[LinkAddress, asyncio.Event]:
    """Return the address of a listener that sends the bytes, and the end of its connection.

    It proves first to have the secret, if it ``knows`` it.
    """
    told = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if knows:
            nonce = new_nonce()
            writer.write(pack_frame([nonce]))
            own, _ = await read_frame(reader, MAX_HELLO_BYTES)
            writer.write(pack_frame([proof(SECRET, Side.LINK_LISTENER, nonce, own)]))
        with suppress(ConnectionError):
            writer.write(data)
            writer.write_eof()
            await reader.read()  # until the other side closes too
        writer.close()
        server.close()
        told.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    return LinkAddress(NODE, SECRET.decode(), host="127.0.0.1", port=port), told


async def _to_gateway(data: bytes, client: TokenSender) -> None:
    taken: asyncio.Queue[tuple[str, TokenEvent]] = asyncio.Queue()

    def on_tokens(request_id: str, event: TokenEvent) -> bool:
        if request_id == "honest":
            taken.put_nowait((request_id, event))
        return True

    server = TokenReceiver(NODE, "127.0.0.1", on_tokens, lambda request_id, is_alone: None)
    address = await server.start()
    reader, writer = await _trusted(address)
    writer.write(data)
    writer.write_eof()
    assert await reader.read() == b""  # it was cut off
    writer.close()
    client.connect(address)
    client.send(address, [("honest", EVENT)])
    assert await taken.get() == ("honest", EVENT)
    client.close()
    server.close()


async def _to_router(data: bytes, client: TokenSender) -> None:
    address, told = await _listener(data)
    client.connect(address)
    await told.wait()
    client.close()
