"""Clients that do not read their streams or send their bodies, and the room of models and keys."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from starlette.types import Message

from cluster.errors import OverloadedError, SlowReaderError
from router.client import Client, Sampling
from router.config.deployment import GatewayConfig
from router.gateway.input.request.model import GrpcRequest
from router.gateway.limits.room import Bodies, Places
from router.gateway.service import Delta, GenerationService
from router.messages.request import GenerationRequest, TokenEvent
from router.protos import inference_pb2, inference_pb2_grpc
from router.security.keys import ANYBODY
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, http_app, says, service
from tests.unit.http_calls import http_server
from tests.unit.virtual_time import run as run_in_virtual_time

SHORT = GatewayConfig(reader_timeout_s=0.05, max_ongoing_requests=1)
WAIT_S = 60.0
BIG, SMALL = 4096, 16_384
"""Tokens of an event, and bytes of a socket's buffer: a few events fill all buffers."""


class Flood(FakeUpstream):
    """Never stops sending, as fast as it is read."""

    def __init__(self) -> None:
        super().__init__(lambda request: ())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        try:
            for number in itertools.count():
                yield TokenEvent(0, (5,) * BIG, start=number * BIG)
                await asyncio.sleep(0)
        finally:
            self.closed.set()


def start(served: GenerationService) -> AsyncGenerator[Delta, None]:
    asked = served.validator.read(GrpcRequest, {"model": "tiny"})
    checked = served.validator.check(asked, "in", streamed=True)
    return served.generate(checked, "grpc", served.charge([checked], ANYBODY, "grpc"))


def counted(served: GenerationService, name: str) -> float:
    told = [sample for group in served.metrics.samples().families.values() for sample in group]
    return sum(value for sample, _, value in told if sample == name)


async def until_closed(upstream: FakeUpstream) -> None:
    assert await asyncio.to_thread(upstream.closed.wait, WAIT_S)
    upstream.closed.clear()


async def test_the_work_ends_while_the_client_does_not_read() -> None:
    upstream = Flood()
    served = service(upstream, SHORT)
    async with aclosing(start(served)) as deltas:
        await anext(deltas)
        await until_closed(upstream)
        await asyncio.sleep(0)
        assert counted(served, "expertmesh_slow_readers_total") == 1
        assert counted(served, "expertmesh_requests_in_flight") == 0
        async with aclosing(start(served)) as others:  # its place is free, too
            assert (await anext(others)).token_ids
        with pytest.raises(SlowReaderError, match=r"read nothing for 0.05 s"):
            await anext(deltas)
    deltas = start(served)
    await anext(deltas)
    await until_closed(upstream)
    await deltas.aclose()  # a client that leaves while its work ends is no error


def test_a_client_that_is_slow_but_reads_keeps_its_stream() -> None:
    async def run() -> None:
        served = service(Flood(), GatewayConfig(reader_timeout_s=0.3))
        async with aclosing(start(served)) as deltas:
            for _ in range(12):  # longer in sum than may be waited for one
                await anext(deltas)
                await asyncio.sleep(0.25)
        assert counted(served, "expertmesh_slow_readers_total") == 0

    run_in_virtual_time(run())


async def test_a_client_may_leave_the_end_of_a_stream_unread() -> None:
    served = service(FakeUpstream(lambda request: [TokenEvent(0, (5,), (), "length")]), SHORT)
    async with aclosing(start(served)) as deltas:
        assert (await anext(deltas)).usage is not None
        async with aclosing(start(served)) as others:
            await anext(others)
        await asyncio.sleep(2 * SHORT.reader_timeout_s)
        assert await anext(deltas, None) is None
    assert counted(served, "expertmesh_slow_readers_total") == 0


def test_a_grpc_stream_that_is_not_read_ends_with_its_reason() -> None:
    upstream = Flood()
    request = inference_pb2.GenerateRequest(model="tiny", prompt="in")
    window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with (
        grpc_server(upstream, limits=SHORT) as address,
        grpc.insecure_channel(address, options=window) as channel,
        Client(address) as other,
    ):
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request, timeout=WAIT_S)
        next(stream)
        assert upstream.closed.wait(WAIT_S)
        pieces = other.stream("in", Sampling(), model="tiny")
        assert next(pieces).token_ids
        pieces.close()  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read nothing for 0.05 s" in caught.value.details()


def test_an_http_stream_that_is_not_read_ends_with_its_reason() -> None:
    upstream = Flood()
    body = b'{"model": "tiny", "prompt": "in", "stream": true, "return_token_ids": true}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with (
        http_server(http_app(upstream, SHORT), SMALL) as port,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.settimeout(WAIT_S)
        client.connect(("127.0.0.1", port))
        client.sendall(head.encode() + body)
        assert client.recv(1024).startswith(b"HTTP/1.1 200")
        assert upstream.closed.wait(WAIT_S)
        rest = b""
        while b"[DONE]" not in rest[-64:]:
            piece = client.recv(1 << 20)
            assert piece, "the server left without a word"
            rest += piece
        assert b"read nothing for 0.05 s" in rest[-1000:]


def test_a_model_leaves_half_of_an_even_share_to_each_other_one() -> None:
    places = Places(12, ["a", "b", "c"])  # two are kept for each
    with places.share_of("a") as crowd:
        crowd.take(8)
        with pytest.raises(OverloadedError, match=r"at most 12 .*, 4 reserved for other") as full:
            crowd.take(1)
        assert full.value.retry_after_s == 1.0
        with places.share_of("b") as other, places.share_of("c") as third:
            other.take(2)
            with pytest.raises(OverloadedError, match="2 reserved for other models"):
                other.take(1)
            third.take(1)
            with pytest.raises(OverloadedError):
                crowd.take(1)
            third.take(1)
            assert places.taken == 12
            with pytest.raises(OverloadedError, match=r"at most 12 concurrent requests$"):
                third.take(1)
        assert places.taken == 8
    assert places.taken == 0
    alone = Places(3, ["a"])
    with alone.share_of("a") as crowd:
        crowd.take(3)
        with pytest.raises(OverloadedError, match=r"at most 3 concurrent requests$"):
            crowd.take(1)
    assert alone.taken == 0


LIMIT = 100


def test_one_key_leaves_as_many_bytes_free_as_it_takes() -> None:
    bodies = Bodies(LIMIT)
    alice, more, bob, last = (bodies.share_of(name) for name in ("alice", "alice", "bob", "bob"))
    alice.take(40)
    more.take(10)
    with pytest.raises(OverloadedError, match="this key's request bodies would take more"):
        more.take(1)
    bob.take(25)
    with pytest.raises(OverloadedError, match="this key"):
        last.take(1)
    more.give_back()
    more.give_back()  # a second one does nothing
    last.take(5)
    assert bodies.taken == 70
    for share in (alice, bob, last):
        share.give_back()
    assert (bodies.taken, bodies.by_name) == (0, {})
    nobody = bodies.share_of("")  # without keys they may take all
    nobody.take(LIMIT)
    with pytest.raises(OverloadedError, match="at most 100 bytes of request bodies at one time"):
        nobody.take(1)


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize(("piece_s", "status"), [(1.0, 200), (4.0, 408)])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_has_a_time_to_come(
    path: str, piece_s: float, status: int, has_length: bool
) -> None:
    """In nine pieces; without a length, the longest body's time counts: 74 s of 4 MiB."""
    upstream = FakeUpstream(says(" was"))
    body = json.dumps({"model": "tiny", "prompt": "in"}).encode()
    pieces = [body[:-8], *(body[-8 + i : len(body) - 7 + i] for i in range(8))]
    late_s = piece_s if has_length else 8 * piece_s
    answer: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(late_s if pieces else 1e6)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        answer.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    scope["headers"] = headers if has_length else headers[:1]
    run_in_virtual_time(http_app(upstream)(scope, receive, send))
    assert answer[0]["status"] == status
    if status == 408:
        assert upstream.requests == []
        assert b"the body did not arrive within" in answer[1]["body"]
