"""What grpcio's server on asyncio must stand, whose versions pyproject.toml bounds for it."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from benchmarks.fuzzing.hostile import http2_call

ANSWER_S = 10.0


def said(port: int, method: str) -> bytes:
    """Call a method over a connection of its own; return the first bytes of the answer."""
    with socket.create_connection(("127.0.0.1", port), ANSWER_S) as stranger:
        stranger.settimeout(ANSWER_S)
        stranger.sendall(http2_call(method, b""))
        return stranger.recv(1 << 16)


@pytest.mark.timeout(60)
def test_a_call_whose_method_is_no_text_does_not_end_the_server() -> None:
    async def serve() -> list[bytes]:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            # The second is taken when the first has been looked at, the third on a new connection.
            return [await asyncio.to_thread(said, port, m) for m in ("/a/b", "/a\xff/b", "/a/b")]
        finally:
            await server.stop(None)

    first, _, third = asyncio.run(serve())
    assert first
    assert third
