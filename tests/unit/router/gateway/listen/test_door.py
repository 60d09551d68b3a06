"""gRPC calls are judged before their messages are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from cluster.errors import ForbiddenError, UnauthenticatedError
from router.gateway.grpc.methods import Method
from router.gateway.listen.door import Door
from router.security.access import FIELD
from router.security.keys import ANYBODY, Caller, Role

KEY, LARGE = "Bearer right", b"x" * (15 << 20)
OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65535),
)


Answered = tuple[Caller | None, int]
"""A call that reached its method: who called, and the message's length."""
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


class OneKey:
    """Admits callers with the right key, after ``go``."""

    is_open = False

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Role | None]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def admit(self, surface: str, given: list[str], role: Role | None) -> Any:
        assert surface == "grpc"
        self.asked.append((given, role))
        await self.go.wait()
        if given != [KEY]:
            raise UnauthenticatedError("a key is needed", FIELD)
        if role is Role.ADMIN:
            raise ForbiddenError("this key is for inference", FIELD)
        return ANYBODY


@asynccontextmanager
async def served() -> AsyncIterator[tuple[OneKey, grpc.aio.Channel, list[Answered]]]:
    access, answered = OneKey(), list[Answered]()

    async def unary(request: bytes, caller: Caller | None, context: Any) -> BytesValue:
        answered.append((caller, len(request)))
        await access.go.wait()
        return BytesValue(value=b"whole")

    async def stream(
        request: bytes, caller: Caller | None, context: Any
    ) -> AsyncGenerator[BytesValue, None]:
        answered.append((caller, len(request)))
        for piece in (b"one", b"two"):
            yield BytesValue(value=piece)

    methods = {
        "/s/Unary": Method(Role.INFERENCE, unary),
        "/s/Stream": Method(Role.INFERENCE, stream, is_stream=True),
        "/s/Admin": Method(Role.ADMIN, unary),
        "/s/Any": Method(None, unary),
        "/s/Open": Method(None, unary, is_open=True),
    }
    server = grpc.aio.server(interceptors=[Door(access, methods, 16 << 20)], options=OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield access, channel, answered
    finally:
        await server.stop(0)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(bounded())


def unary(channel: grpc.aio.Channel, name: str) -> Any:
    return channel.unary_unary(f"/s/{name}", response_deserializer=value_of)


def value_of(message: bytes) -> bytes:
    return BytesValue.FromString(message).value


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


def test_admitted_calls_are_answered_and_others_refused_by_their_metadata() -> None:
    async def body() -> None:
        async with served() as (access, channel, answered):
            right, wrong = ((FIELD, KEY),), ((FIELD, "Bearer wrong"),)
            whole = unary(channel, "Unary")
            stream = channel.unary_stream("/s/Stream", response_deserializer=value_of)
            assert await whole(b"abc", metadata=right) == b"whole"
            assert [piece async for piece in stream(b"ab", metadata=right)] == [b"one", b"two"]
            assert answered == [(ANYBODY, 3), (ANYBODY, 2)]
            for metadata in ((), wrong, right + right):
                assert await code_of(whole(b"", metadata=metadata)) is UNAUTHENTICATED
                pieces = stream(b"", metadata=metadata)
                assert await code_of(anext(aiter(pieces))) is UNAUTHENTICATED
            refused = await code_of(unary(channel, "Admin")(b"", metadata=right))
            assert refused is grpc.StatusCode.PERMISSION_DENIED
            assert len(answered) == 2
            assert await unary(channel, "Any")(b"", metadata=right) == b"whole"
            assert (access.asked[-2][1], access.asked[-1][1]) == (Role.ADMIN, None)

    run(body)


def test_an_open_method_needs_no_key_but_judges_one() -> None:
    async def body() -> None:
        async with served() as (access, channel, answered):
            opened = unary(channel, "Open")
            assert await opened(b"") == b"whole"
            assert access.asked == []
            wrong = opened(b"", metadata=((FIELD, "Bearer wrong"),))
            assert await code_of(wrong) is UNAUTHENTICATED
            assert await opened(b"", metadata=((FIELD, KEY),)) == b"whole"
            assert [caller for caller, _ in answered] == [None, ANYBODY]

    run(body)


def test_calls_of_no_method_are_unimplemented_with_and_without_a_key() -> None:
    async def body() -> None:
        async with served() as (access, channel, _):
            for metadata in ((), ((FIELD, KEY),)):
                refused = await code_of(unary(channel, "Missing")(b"", metadata=metadata))
                assert refused is grpc.StatusCode.UNIMPLEMENTED
            assert access.asked == []

    run(body)


@pytest.mark.parametrize(("name", "reads"), [("Unary", False), ("Open", True)])
def test_messages_of_strangers_are_not_read_while_they_wait(name: str, reads: bool) -> None:
    """The client holds a copy of each message, and a server that reads it another one."""

    async def body() -> None:
        async with served() as (access, channel, answered):
            access.go.clear()
            before = psutil.Process().memory_info().rss
            calls = [unary(channel, name)(LARGE) for _ in range(24)]
            while len(answered if reads else access.asked) < len(calls):
                await asyncio.sleep(0.01)
            grown = psutil.Process().memory_info().rss - before
            # Where they are read, memory that an earlier test has freed may take them.
            assert reads or grown < 2 * 24 * len(LARGE)
            access.go.set()
            if reads:
                assert {await call for call in calls} == {b"whole"}
            else:
                assert {await code_of(call) for call in calls} == {UNAUTHENTICATED}
            assert answered == [(None, len(LARGE))] * 24 * reads

    run(body)
