"""Target: the token link between routers and gateways, at both of its ends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack

from benchmarks.fuzzing.target import Target
from router.messages.request import TokenEvent, TokenLogprobs
from router.messages.token_link import LinkAddress, LinkClient, LinkServer

LIMIT_S = 10.0
EVENT = TokenEvent(1, (5, 6), (TokenLogprobs(-0.5, (5,), (-0.5,)),) * 2, "stop", False, 3)


def packed(body: list[Any]) -> bytes:
    """Return a frame of the link."""
    data: bytes = msgpack.packb(body)
    return len(data).to_bytes(4, "big") + data


def link() -> Target:
    """Return the target; a router with the secret sends the bytes, and so does a gateway."""

    def run(data: bytes) -> None:
        # They outlive the loop, as a router's does: one that is collected takes its tasks with it.
        clients = [LinkClient(lambda request_id, index: None) for _ in range(2)]
        asyncio.run(_both(data, *clients))

    events = packed([["a", EVENT.to_wire()], ["b", EVENT.to_wire()]])
    stops = packed(["stop", "a", 1])
    return Target([events, stops, stops + events, packed(["0" * 64])], run)


async def _both(data: bytes, honest: LinkClient, fooled: LinkClient) -> None:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    async with asyncio.timeout(LIMIT_S):
        await _to_gateway(data, honest)
        await _to_router(data, fooled)
    assert not faults, f"nobody took {faults[0]}"


async def _to_gateway(data: bytes, client: LinkClient) -> None:
    taken: asyncio.Queue[tuple[str, TokenEvent]] = asyncio.Queue()

    def on_tokens(request_id: str, event: TokenEvent) -> bool:
        if request_id == "honest":
            taken.put_nowait((request_id, event))
        return True

    server = LinkServer("127.0.0.1", on_tokens)
    address = await server.start()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(packed([address.secret]) + data)
    writer.write_eof()
    assert await reader.read() == b""  # it was cut off
    writer.close()
    await client.connect(address)
    client.send(address, [("honest", EVENT)])
    assert await taken.get() == ("honest", EVENT)
    client.close()
    server.close()


async def _to_router(data: bytes, client: LinkClient) -> None:
    told = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.write_eof()
        await reader.read()  # until the router closes too
        writer.close()
        told.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await client.connect(LinkAddress("127.0.0.1", port, "secret"))
    await told.wait()
    client.close()
    server.close()
