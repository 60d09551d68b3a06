"""Either client, and a stream of it whose server dies."""

from __future__ import annotations

from typing import Any

from router.client import Client, Reply, Sampling
from router.retry import RetryPolicy
from tests.unit.blocking_client import BlockingAsyncClient
from tests.unit.gateway_fakes import HasMethods, serve_grpc

Connect = type[Client] | type[BlockingAsyncClient]
QUICK = RetryPolicy(first_delay_s=0.01, max_delay_s=0.05)


def whole_reply(gateway: HasMethods, connect: Connect, prompt: Any, asked: Sampling) -> Reply:
    with serve_grpc(gateway) as address, connect(address) as client:
        [reply] = client.generate(prompt, asked)
        return reply


def broken_stream(
    connect: Connect,
    first: HasMethods,
    second: HasMethods,
    prompt: Any,
    sampling: Sampling,
    count: int,
    **options: Any,
) -> list[Reply]:
    """Read ``count`` pieces from one server and the rest, after its death, from another."""
    pieces: list[Reply] = []
    with serve_grpc(first) as address:
        client = connect(address, retry=QUICK)
        stream = client.stream(prompt, sampling, timeout_s=30, **options)
        client.model_info()  # it has reached a server, also where no token comes from it
        for _ in range(count):
            pieces.append(next(stream))
    with serve_grpc(second, int(address.rpartition(":")[2])), client:
        pieces.extend(stream)
    return pieces
