"""A client that does not read its stream: its work ends, others' goes on, and it is counted."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
import pytest

from cluster.errors import DeadlineExceededError, OverloadedError, SlowReaderError
from router.client import Client, Sampling
from router.config.deployment import GatewayConfig
from router.gateway.input.request.model import GrpcRequest
from router.gateway.limits.room import Places
from router.gateway.service import Delta, GenerationService
from router.messages.request import GenerationRequest, TokenEvent
from router.protos import inference_pb2, inference_pb2_grpc
from router.security.keys import ANYBODY
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, http_app, service
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


ASKED = {"model": "tiny"}


def start(
    served: GenerationService, given: dict[str, object] = ASKED
) -> AsyncGenerator[Delta, None]:
    asked = served.validator.read(GrpcRequest, given)
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


async def test_a_token_that_never_comes_ends_with_the_deadline() -> None:
    upstream = FakeUpstream(lambda request: (), endless=True)
    served = service(upstream)
    with pytest.raises(DeadlineExceededError):
        await anext(start(served, {**ASKED, "timeout_s": 0.01}))
    await until_closed(upstream)
    assert counted(served, "expertmesh_requests_in_flight") == 0


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


async def test_one_more_request_than_may_be_under_way_is_refused() -> None:
    served = service(Flood(), GatewayConfig(max_ongoing_requests=2))
    async with aclosing(start(served)) as one, aclosing(start(served)) as two:
        await anext(one)
        await anext(two)
        with pytest.raises(OverloadedError, match="at most 2 requests") as caught:
            await anext(start(served))
        assert caught.value.retry_after_s == 1.0
        await one.aclose()
        async with aclosing(start(served)) as three:
            await anext(three)


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
        with pytest.raises(
            OverloadedError, match=r"at most 12 .*, 4 of them kept for other"
        ) as full:
            crowd.take(1)
        assert full.value.retry_after_s == 1.0
        with places.share_of("b") as other, places.share_of("c") as third:
            other.take(2)
            with pytest.raises(OverloadedError, match="2 of them kept for other models"):
                other.take(1)
            third.take(1)
            with pytest.raises(OverloadedError):
                crowd.take(1)
            third.take(1)
            assert places.taken == 12
            with pytest.raises(OverloadedError, match=r"at most 12 requests at one time$"):
                third.take(1)
        assert places.taken == 8
    assert places.taken == 0
    alone = Places(3, ["a"])
    with alone.share_of("a") as crowd:
        crowd.take(3)
        with pytest.raises(OverloadedError, match=r"at most 3 requests at one time$"):
            crowd.take(1)
    assert alone.taken == 0
