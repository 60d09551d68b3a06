"""Clients that leave: what the deployment still holds for them a moment later."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from benchmarks.common import MODEL
from benchmarks.held import descriptors, idle, memory_mb, wait_back
from benchmarks.open_loop import TIMEOUT_S, body_of, prompt_of

if TYPE_CHECKING:
    import httpx

    from benchmarks.serve_clients import Ports
    from router.client import AsyncClient

AT_ONCE = 50
TOKENS = 600
"""Far more than any client waits for."""
PIECES = 2
LATEST_S = 0.5
"""Clients of whole answers leave at a random moment up to then: some before they are sent on."""
WARM = 200
"""Cancelled before anything is looked at, since caches fill and connections are made."""
SETTLE_S = 30.0
"""By then Python has collected what refers to itself, such as objects of Ray's cancelled calls, and
idle connections between proxy and gateway are closed."""
BACK_S = 60.0


class Leaver:
    """Begins requests and goes away: after some tokens of a stream, or from a whole answer."""

    def __init__(self, client: AsyncClient, http: httpx.AsyncClient, url: str, seed: int) -> None:
        self._client = client
        self._http = http
        self._url = url
        self._random = random.Random(seed)

    async def leave(self, number: int) -> str:
        """Begin a request and leave it; returns how, or that it was there too early or failed."""
        wait_s = self._random.uniform(0.0, LATEST_S)
        how = ("gRPC stream", "HTTP stream", "gRPC whole", "HTTP whole")[number % 4]
        ways = (self._grpc_stream, self._http_stream, self._grpc_whole, self._http_whole)
        try:
            if number % 4 < 2:
                await ways[number % 4](prompt_of(number))
                return how
            async with asyncio.timeout(wait_s):
                await ways[number % 4](prompt_of(number))
        except TimeoutError:
            return how
        except Exception as error:  # whatever it is, it is counted
            return f"{how}: {type(error).__name__}"
        return f"{how}: was answered"

    async def _grpc_stream(self, prompt: list[int]) -> None:
        pieces = self._client.stream(prompt, _sampling(), model=MODEL, timeout_s=TIMEOUT_S)
        async with aclosing(pieces):
            for _ in range(PIECES):
                await anext(pieces)

    async def _http_stream(self, prompt: list[int]) -> None:
        body = body_of(prompt, TOKENS, True)
        async with self._http.stream("POST", self._url, json=body) as answer:
            answer.raise_for_status()
            events = answer.aiter_lines()
            for _ in range(PIECES):
                await anext(events)

    async def _grpc_whole(self, prompt: list[int]) -> None:
        await self._client.generate(prompt, _sampling(), model=MODEL, timeout_s=TIMEOUT_S)

    async def _http_whole(self, prompt: list[int]) -> None:
        answer = await self._http.post(self._url, json=body_of(prompt, TOKENS, False))
        answer.raise_for_status()


def _sampling() -> Any:
    from router.client import Sampling

    return Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


async def _leave_all(
    ports: Ports, count: int, seed: int, begun: Callable[[int], None] = lambda count: None
) -> Counter[str]:
    import httpx

    from router.client import AsyncClient

    url = f"http://127.0.0.1:{ports.http}/v1/completions"
    left: Counter[str] = Counter()
    numbers = iter(range(count))
    async with (
        AsyncClient(ports.grpc_address, retry=None) as client,
        httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        leaver = Leaver(client, http, url, seed)

        async def go() -> None:
            for number in numbers:
                left[await leaver.leave(number)] += 1
                begun(number)

        for _ in range(AT_ONCE):
            group.create_task(go())
    return left


def run(ports: Ports, count: int, seed: int, begin: Callable[[str], None]) -> dict[str, Any]:
    """Have clients leave; returns what was held before and after, and how long it was more."""
    begin(f"{WARM} clients that leave, not counted")
    asyncio.run(_leave_all(ports, WARM, seed))
    time.sleep(SETTLE_S)
    before, files, memory = idle(ports), descriptors(), memory_mb()
    begin(f"{count} clients that leave")
    left = asyncio.run(_leave_all(ports, count, seed + 1))
    after, back_s = wait_back(ports, before, BACK_S)
    time.sleep(max(0.0, SETTLE_S - max(back_s.values())))
    return {
        "left": dict(left),
        "before": before,
        "after": after,
        "back_s": back_s,
        "descriptors": {"before": files, "after": descriptors()},
        "memory_mb": {"before": memory, "after": memory_mb()},
    }
