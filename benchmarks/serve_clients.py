"""The clients that load a deployment: by gRPC and HTTP, unary and streamed, all at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import MODEL, prompts

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the deployment listens; free ones, so that no other deployment answers instead."""

    http: int
    grpc: int

    @property
    def grpc_address(self) -> str:
        """The address of the gRPC services."""
        return f"127.0.0.1:{self.grpc}"


@dataclass(slots=True)
class Timed:
    """When a request began, and the pieces of its answer came, each with some tokens."""

    started_s: float = field(default_factory=time.perf_counter)
    pieces: list[tuple[float, int]] = field(default_factory=list)
    ended_s: float = 0.0

    def piece(self, tokens: int) -> None:
        """Note a piece that came now; one without tokens tells nothing."""
        if tokens:
            self.pieces.append((time.perf_counter(), tokens))

    def end(self) -> Timed:
        """Note the end of the answer."""
        self.ended_s = time.perf_counter()
        return self

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return sum(tokens for _, tokens in self.pieces)


Round = Callable[[], list[Timed]]
"""Has every client make one request, all at once."""


@contextmanager
def grpc_clients(ports: Ports, clients: int, tokens: int, stream: bool) -> Iterator[Round]:
    """Yield a round over one gRPC connection, a thread for each client."""
    from router.client import Client, Sampling

    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    def ask(prompt: list[int]) -> Timed:
        timed = Timed()
        call = client.stream if stream else client.generate
        for reply in call(prompt, sampling, model=MODEL, timeout_s=TIMEOUT_S):
            timed.piece(len(reply.token_ids))
        return timed.end()

    with Client(ports.grpc_address) as client, ThreadPoolExecutor(clients) as pool:
        yield lambda: list(pool.map(ask, prompts(clients)))


@contextmanager
def http_clients(ports: Ports, clients: int, tokens: int, stream: bool) -> Iterator[Round]:
    """Yield a round over HTTP, a connection for each client, all on one event loop.

    The client is aiohttp, whose parser is compiled: it shares the cores with the deployment, and
    httpx takes as long for a token as the router.
    """
    import aiohttp

    url = f"http://127.0.0.1:{ports.http}/v1/completions"
    body = {
        "model": MODEL,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
        # Else a stream has no event for a token that ends no character.
        "return_token_ids": True,
    }

    async def ask(http: aiohttp.ClientSession, prompt: list[int]) -> Timed:
        timed = Timed()
        async with http.post(url, json={**body, "prompt": prompt}) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {await answer.text()}")
            async for chunk in _sse(answer) if stream else _whole(answer):
                for choice in chunk["choices"]:
                    timed.piece(len(choice["token_ids"]))
        return timed.end()

    async def ask_all(http: aiohttp.ClientSession) -> list[Timed]:
        return await asyncio.gather(*(ask(http, prompt) for prompt in prompts(clients)))

    async def session() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients), timeout=timeout)

    with asyncio.Runner() as runner:
        http = runner.run(session())
        try:
            yield lambda: runner.run(ask_all(http))
        finally:
            runner.run(http.close())


async def _sse(answer: Any) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            yield chunk


async def _whole(answer: Any) -> AsyncIterator[dict[str, Any]]:
    yield await answer.json()


WAYS: Mapping[str, tuple[Any, bool]] = {
    "gRPC unary": (grpc_clients, False),
    "gRPC stream": (grpc_clients, True),
    "HTTP unary": (http_clients, False),
    "HTTP SSE": (http_clients, True),
}
