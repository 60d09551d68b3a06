"""What grpcio's server on asyncio must stand, whose versions pyproject.toml bounds for it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from benchmarks.fuzzing.hostile import http2_call, said

ANSWER_S = 60.0


@pytest.mark.timeout(60)
def test_a_call_whose_method_is_no_text_does_not_end_the_server() -> None:
    async def code_of_the_next_call() -> grpc.StatusCode:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        # Until nothing more comes, by when a server that it ends has ended.
        await asyncio.to_thread(said, ("127.0.0.1", port), http2_call("/a\xff/b", b""))
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await channel.unary_unary("/a/b")(b"", timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await server.stop(None)
        raise AssertionError("a method that is not there was called")

    assert asyncio.run(code_of_the_next_call()) is grpc.StatusCode.UNIMPLEMENTED
