"""gRPC calls are judged before their messages are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest

from cluster.errors import ForbiddenError, UnauthenticatedError
from router.gateway.listen.door import Door
from router.security.access import FIELD
from router.security.keys import ANYBODY, Role

KEY, LARGE = "Bearer right", b"x" * (15 << 20)
OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65535),
)


class OneKey:
    """Admits callers with the right key, after ``go``."""

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
async def served() -> AsyncIterator[tuple[OneKey, grpc.aio.Channel, list[int]]]:
    access, lengths = OneKey(), list[int]()

    async def unary(request: bytes, context: Any) -> bytes:
        lengths.append(len(request))
        await access.go.wait()
        return b"whole"

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        lengths.append(len(request))
        for piece in (b"one", b"two"):
            yield piece

    handlers = {
        "/s/Unary": grpc.unary_unary_rpc_method_handler(unary),
        "/s/Stream": grpc.unary_stream_rpc_method_handler(stream),
        "/s/Admin": grpc.unary_unary_rpc_method_handler(unary),
        "/s/Any": grpc.unary_unary_rpc_method_handler(unary),
        "/s/Open": grpc.unary_unary_rpc_method_handler(unary),
    }

    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return handlers.get(handler_call_details.method)

    roles = {"/s/Unary": Role.INFERENCE, "/s/Stream": Role.INFERENCE, "/s/Any": None}
    door = Door(access, roles | {"/s/Admin": Role.ADMIN}, ["/s/Open"])  # type: ignore[operator]
    server = grpc.aio.server(handlers=[Handlers()], interceptors=[door], options=OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield access, channel, lengths
    finally:
        await server.stop(0)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(bounded())


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


def test_admitted_calls_are_answered_and_others_refused_by_their_metadata() -> None:
    async def body() -> None:
        async with served() as (access, channel, lengths):
            right, wrong = ((FIELD, KEY),), ((FIELD, "Bearer wrong"),)
            unary, stream = channel.unary_unary("/s/Unary"), channel.unary_stream("/s/Stream")
            assert await unary(b"abc", metadata=right) == b"whole"
            assert [piece async for piece in stream(b"ab", metadata=right)] == [b"one", b"two"]
            assert lengths == [3, 2]
            unauthenticated = grpc.StatusCode.UNAUTHENTICATED
            for metadata in ((), wrong, right + right):
                assert (await code_of(unary(b"", metadata=metadata)))[0] is unauthenticated
                pieces = stream(b"", metadata=metadata)
                assert (await code_of(anext(aiter(pieces))))[0] is unauthenticated
            admin = channel.unary_unary("/s/Admin")
            assert (await code_of(admin(b"", metadata=right)))[
                0
            ] is grpc.StatusCode.PERMISSION_DENIED
            assert await channel.unary_unary("/s/Any")(b"", metadata=right) == b"whole"
            assert (access.asked[-2][1], access.asked[-1][1]) == (Role.ADMIN, None)
            assert lengths == [3, 2, 0]

    run(body)


def test_an_open_method_needs_no_key_but_judges_one() -> None:
    async def body() -> None:
        async with served() as (access, channel, _):
            opened = channel.unary_unary("/s/Open")
            assert await opened(b"") == b"whole"
            assert access.asked == []
            told = await code_of(opened(b"", metadata=((FIELD, "Bearer wrong"),)))
            assert told[0] is grpc.StatusCode.UNAUTHENTICATED
            told = await code_of(channel.unary_unary("/s/Missing")(b""))
            assert told[0] is grpc.StatusCode.UNIMPLEMENTED

    run(body)


@pytest.mark.parametrize(("path", "reads"), [("/s/Unary", False), ("/s/Open", True)])
def test_messages_of_strangers_are_not_read_while_they_wait(path: str, reads: bool) -> None:
    """The client holds a copy of each message, and a server that reads it another one."""

    async def body() -> None:
        async with served() as (access, channel, lengths):
            access.go.clear()
            before = psutil.Process().memory_info().rss
            calls = [channel.unary_unary(path)(LARGE) for _ in range(24)]
            while len(lengths if reads else access.asked) < len(calls):
                await asyncio.sleep(0.01)
            grown = psutil.Process().memory_info().rss - before
            assert (grown > 2 * 24 * len(LARGE)) == reads
            access.go.set()
            if reads:
                assert {await call for call in calls} == {b"whole"}
            else:
                codes = {(await code_of(call))[0] for call in calls}
                assert codes == {grpc.StatusCode.UNAUTHENTICATED}
            assert lengths == [len(LARGE)] * 24 * reads

    run(body)
