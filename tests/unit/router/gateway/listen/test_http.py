"""The HTTP port of a gateway: requests, and everything that is none."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from router.config.listen import ListenConfig
from router.gateway.listen import http
from router.gateway.listen.http import MAX_PIPELINED, HttpListener
from tests.unit.router.gateway.listen.loops import in_loop, until

LIMITS = ListenConfig(
    max_connections=64, max_connections_per_address=64, head_timeout_s=20.0, max_head_bytes=8192
)
HEAD = b"GET /path HTTP/1.1\r\nhost: localhost\r\n"
Address = tuple[str, int]


def limited(**limits: float) -> ListenConfig:
    return LIMITS.model_copy(update=limits)


class Echo:
    """Answers with the path and the body; ``/wait`` and ``/stream`` wait for ``go``."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.began = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        response: Response = PlainTextResponse(request.url.path.encode() + b" " + body)
        self.began.set()
        if request.url.path == "/wait":
            await self.go.wait()
        if request.url.path == "/stream":
            response = StreamingResponse(self._pieces())
        if request.url.path == "/large":
            response = PlainTextResponse(b"x" * (8 << 20))
        await response(scope, receive, send)

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield b"first "
        await self.go.wait()
        yield b"last"


@asynccontextmanager
async def served(
    limits: ListenConfig = LIMITS,
) -> AsyncIterator[tuple[HttpListener, Echo, Address]]:
    app = Echo()
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        listener = HttpListener(app, [listening], listening.close, limits)
        listener.start()
        try:
            yield listener, app, listening.getsockname()
        finally:
            await listener.stop(0)
            assert listener.connections == 0
            assert asyncio.all_tasks() == {asyncio.current_task()}


async def answer_to(address: Address, *pieces: bytes) -> bytes:
    """Return all that comes after these bytes until the server closes."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize("count", [1, 40])
@in_loop
async def test_requests_are_answered_on_one_connection_and_on_many(count: int) -> None:
    """Bodies may be larger than heads."""
    async with served() as (listener, _, (host, port)), httpx.AsyncClient(timeout=60) as client:
        url = f"http://{host}:{port}"
        bodies = [b"b" * (n * 10_000) for n in range(count + 1)]
        posts = (client.post(f"{url}/{n}", content=body) for n, body in enumerate(bodies))
        answers = [answer.content for answer in await asyncio.gather(*posts)]
        assert answers == [b"/%d " % n + body for n, body in enumerate(bodies)]
        for _ in range(3):
            assert (await client.get(f"{url}/again")).content == b"/again "
        assert 1 <= listener.connections <= len(bodies)


@pytest.mark.parametrize(
    ("pieces", "status", "words"),
    [
        ([b"no such thing\r\n\r\n"], 400, "not an HTTP/1.1 request"),
        ([b"\x16\x03\x01\x02\x00\x01\x00"], 400, "not an HTTP/1.1 request"),
        ([HEAD + b"x: ", *[b"y" * 1000] * 9], 431, "over the limit of 8192 bytes"),
        ([b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\n\r\n"], 431, "over the limit of 8192 bytes"),
    ],
)
@in_loop
async def test_what_is_no_request_is_answered_and_the_connection_closed(
    pieces: list[bytes], status: int, words: str
) -> None:
    async with served() as (_, app, address):
        told = error_of(await answer_to(address, *pieces))
        assert (told[0], words in told[1]) == (status, True)
        assert not app.began.is_set()


@pytest.mark.parametrize("begun", [b"", b"\r\n", HEAD])
@pytest.mark.parametrize("follows_answer", [False, True])
@in_loop
async def test_a_head_that_does_not_come_in_time_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, begun: bytes, follows_answer: bool
) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.3)
    async with served(limited(head_timeout_s=0.3)) as (listener, _, address):
        first = HEAD + b"\r\n" if follows_answer else b""
        reader, writer = await asyncio.open_connection(*address)
        writer.write(first)
        if follows_answer:
            assert (await reader.readuntil(b"/path ")).startswith(b"HTTP/1.1 200")
        writer.write(begun)
        told = await reader.read()
        if begun == HEAD:
            assert error_of(told) == (408, "no complete request head arrived within 0.3 s")
        await until(lambda: listener.connections == 0)
        writer.close()


@in_loop
async def test_pipelined_requests_are_answered_in_order_and_a_flood_ends() -> None:
    async with served() as (_, _, address):
        names = [b"/%d" % number for number in range(MAX_PIPELINED)]
        heads = [b"GET " + name + b" HTTP/1.1\r\nhost: a\r\n\r\n" for name in names]
        last = b"GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        answers = await answer_to(address, b"".join([*heads, last]))
        places = [answers.index(name + b" ") for name in [*names, b"/last"]]
        assert places == sorted(places)
        flood = await answer_to(address, b"".join(heads * 3))
        assert flood.count(b"HTTP/1.1") <= MAX_PIPELINED + 1


@in_loop
async def test_old_clients_are_answered_and_cut() -> None:
    async with served() as (_, _, address):
        answer = await answer_to(address, b"GET /old HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"/old ")


@in_loop
async def test_idle_connections_give_way_to_new_ones_and_busy_ones_do_not() -> None:
    async with served(limited(max_connections=3)) as (listener, app, address):
        waiting = asyncio.create_task(
            answer_to(address, b"GET /wait HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        )
        await app.began.wait()
        for number in range(12):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % number)
            assert await reader.readuntil(b"/%d " % number)
            assert listener.connections <= 3
        app.go.set()
        assert (await waiting).endswith(b"/wait ")


@in_loop
async def test_one_address_has_its_share_of_connections(caplog: pytest.LogCaptureFixture) -> None:
    limits = limited(max_connections_per_address=2)
    async with served(limits) as (listener, _, address):
        opened = [await asyncio.open_connection(*address) for _ in range(2)]
        await until(lambda: listener.connections == 2)
        reader, writer = await asyncio.open_connection(*address)
        assert await reader.read() == b""
        writer.close()
        other, writer = await asyncio.open_connection(*address, local_addr=("127.0.0.2", 0))
        writer.write(HEAD + b"\r\n")
        assert await other.readuntil(b"/path ")
        for _, one in opened:
            one.close()
        await until(lambda: listener.connections == 1)
    assert (
        "HTTP: 1 connections refused; the last came from 127.0.0.1, which may have 2" in caplog.text
    )


@in_loop
async def test_a_drain_ends_no_request_and_no_connection_that_is_about_to_send() -> None:
    async with served() as (listener, app, address):
        kept, writer = await asyncio.open_connection(*address)
        writer.write(HEAD + b"\r\n")
        assert await kept.readuntil(b"/path ")
        streaming = asyncio.create_task(
            answer_to(address, b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n")
        )
        await until(lambda: listener.connections == 2)
        stopping = asyncio.create_task(listener.stop(30))
        await asyncio.sleep(0)
        writer.write(HEAD + b"\r\n")
        last = await kept.read()
        assert b"connection: close" in last
        assert last.endswith(b"/path ")
        app.go.set()
        assert (await streaming).endswith(b"last\r\n0\r\n\r\n")
        await stopping


@in_loop
async def test_what_does_not_end_in_time_is_cut_off() -> None:
    async with served() as (listener, app, address):
        waiting = asyncio.create_task(answer_to(address, b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n"))
        await app.began.wait()
        await listener.stop(0.05)
        [left] = await asyncio.gather(waiting, return_exceptions=True)
        assert left == b"" or isinstance(left, ConnectionError)


@pytest.mark.parametrize("count", [0, 1, 40])
@in_loop
async def test_connections_that_wait_at_its_end_are_answered_and_later_ones_refused(
    count: int,
) -> None:
    async with served() as (listener, _, address):
        waiting = [socket.create_connection(address) for _ in range(count)]
        for one in waiting:
            one.sendall(HEAD + b"\r\n")
        await listener.stop(20)  # the first time that the loop runs
        for one in waiting:
            with one, one.makefile("rb") as answer:
                assert answer.read().endswith(b"/path ")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


@in_loop
async def test_an_answer_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "UNREAD_S", 0.1)
    async with served() as (listener, _, address):
        _, writer = await asyncio.open_connection(*address, limit=1024)
        assert isinstance(writer.transport, asyncio.Transport)
        writer.transport.pause_reading()
        writer.write(b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        await until(lambda: listener.connections == 1)
        await until(lambda: listener.connections == 0)
        writer.close()
