"""Requests that come whether or not earlier ones are done: arrivals, asking, what came back.

A closed loop, in which each client waits for its answer, slows down with the server and so never
overloads it. Latencies count from when a request was due, not from when it could be sent, so that
a busy client does not make the server look fast.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from benchmarks.common import MODEL, PROMPT_TOKENS, summary_ms

if TYPE_CHECKING:
    import httpx

    from benchmarks.serve_clients import Ports
    from router.client import AsyncClient

Surface = Literal["gRPC", "HTTP"]
VOCAB = 2000
"""Token ids that the bundled model has for certain."""
TIMEOUT_S = 120.0
ANSWERED: Mapping[Surface, str] = {"gRPC": "OK", "HTTP": "200"}
SHED: Mapping[Surface, str] = {"gRPC": "RESOURCE_EXHAUSTED", "HTTP": "429"}
"""How a request is told to come back later; without a time for it, the kind says so."""
NO_HINT = " without a time"
T = TypeVar("T")


@dataclass(slots=True)
class Answer:
    """What came of one request; times in seconds after the first one was due.

    ``kind`` is the gRPC code or the HTTP status. ``pieces`` are when how many tokens came, all at
    once where it was no stream.
    """

    surface: Surface
    due_s: float
    sent_s: float
    ended_s: float = 0.0
    kind: str = ""
    pieces: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_answered(self) -> bool:
        """Whether the whole answer came."""
        return self.kind == ANSWERED[self.surface]

    @property
    def took_s(self) -> float:
        """From when it was due to its end."""
        return self.ended_s - self.due_s

    @property
    def first_token_s(self) -> float:
        """From when it was due to its first token; only of a stream that was answered."""
        return self.pieces[0][0] - self.due_s

    def between_s(self) -> list[float]:
        """Return the times between tokens; a piece of several is as many equal times."""
        return [
            (later - sooner) / tokens
            for (sooner, _), (later, tokens) in zip(self.pieces, self.pieces[1:], strict=False)
            for _ in range(tokens)
        ]


def arrivals_s(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Return when requests come that know nothing of each other: a Poisson process, ascending."""
    source, at_s, times = random.Random(seed), 0.0, []
    while (at_s := at_s + source.expovariate(rate_per_s)) < seconds:
        times.append(at_s)
    return times


async def offer(
    due_s: Sequence[float],
    ask: Callable[[int, float], Awaitable[T]],
    begun: Callable[[int], None] = lambda count: None,
) -> list[T]:
    """Ask at each time, ascending, whatever became of the requests before; returns what came.

    ``ask`` is given the request's number and when the first second began, by the loop's clock.
    ``begun`` is told how many have been asked, now and then.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    asked: list[asyncio.Future[T]] = []
    try:
        for number, due in enumerate(due_s):
            await asyncio.sleep(max(0.0, start_s + due - loop.time()))
            asked.append(asyncio.ensure_future(ask(number, start_s)))
            begun(number + 1)
        # One by one: gather's callbacks for thousands of answers would hold up the last request.
        return [await one for one in asked]
    finally:
        for one in asked:
            one.cancel()


class Asker:
    """Asks one deployment, without retries; even numbers over gRPC, odd ones over HTTP."""

    def __init__(self, client: AsyncClient, http: httpx.AsyncClient, url: str, tokens: int) -> None:
        self._client = client
        self._http = http
        self._url = url
        self._tokens = tokens

    async def ask(self, number: int, due_s: float, start_s: float, stream: bool) -> Answer:
        """Ask once; ``due_s`` is after ``start_s``, which is by the loop's clock."""
        loop = asyncio.get_running_loop()
        surface: Surface = "HTTP" if number % 2 else "gRPC"
        answer = Answer(surface, due_s, loop.time() - start_s)
        ways = {
            ("gRPC", False): self._grpc_whole,
            ("gRPC", True): self._grpc_stream,
            ("HTTP", False): self._http_whole,
            ("HTTP", True): self._http_stream,
        }

        def piece(tokens: int) -> None:
            if tokens:
                answer.pieces.append((loop.time() - start_s, tokens))

        try:
            answer.kind = await ways[surface, stream](prompt_of(number), piece)
        except Exception as error:  # whatever it is, it is counted
            answer.kind = type(error).__name__
        if answer.is_answered and sum(tokens for _, tokens in answer.pieces) != self._tokens:
            answer.kind = "another number of tokens"
        answer.ended_s = loop.time() - start_s
        return answer

    async def _grpc_whole(self, prompt: list[int], piece: Callable[[int], None]) -> str:
        from cluster.errors import ExpertMeshError

        try:
            replies = await self._client.generate(
                prompt, self._sampling(), model=MODEL, timeout_s=TIMEOUT_S
            )
        except ExpertMeshError as error:
            return _code_of(error)
        piece(sum(len(reply.token_ids) for reply in replies))
        return ANSWERED["gRPC"]

    async def _grpc_stream(self, prompt: list[int], piece: Callable[[int], None]) -> str:
        from cluster.errors import ExpertMeshError

        replies = self._client.stream(prompt, self._sampling(), model=MODEL, timeout_s=TIMEOUT_S)
        try:
            async with aclosing(replies):
                async for reply in replies:
                    piece(len(reply.token_ids))
        except ExpertMeshError as error:
            return _code_of(error)
        return ANSWERED["gRPC"]

    def _sampling(self) -> Any:
        from router.client import Sampling

        return Sampling(max_tokens=self._tokens, temperature=0.0, ignore_eos=True)

    async def _http_whole(self, prompt: list[int], piece: Callable[[int], None]) -> str:
        answer = await self._http.post(self._url, json=body_of(prompt, self._tokens, False))
        if answer.status_code == 200:
            piece(_tokens_of(answer.json()))
        return _status_of(answer)

    async def _http_stream(self, prompt: list[int], piece: Callable[[int], None]) -> str:
        body = body_of(prompt, self._tokens, True)
        async with self._http.stream("POST", self._url, json=body) as answer:
            if answer.status_code != 200:
                return _status_of(answer)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return f"200, then {event['error']['code']}"
                    piece(_tokens_of(event))
        return ANSWERED["HTTP"]


@asynccontextmanager
async def asker(ports: Ports, tokens: int) -> AsyncIterator[Asker]:
    """Connect to a deployment; every answer is greedy and has so many tokens.

    Until it ends, Python's collector does not look at what this process held before: that takes
    0.1 s each time, which a request would seem to have waited.
    """
    import httpx

    from router.client import AsyncClient

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with (
        AsyncClient(ports.grpc_address, retry=None) as client,
        httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S, trust_env=False) as http,
    ):
        gc.collect()
        gc.freeze()
        try:
            yield Asker(client, http, f"http://127.0.0.1:{ports.http}/v1/completions", tokens)
        finally:
            gc.unfreeze()


def prompt_of(number: int) -> list[int]:
    """Return the prompt of a request by its number; neighbours differ in every token."""
    return [2 + (31 * number + 7 * place) % VOCAB for place in range(PROMPT_TOKENS)]


def body_of(prompt: Sequence[int], tokens: int, stream: bool, **more: Any) -> dict[str, Any]:
    """Return an HTTP body that asks for so many tokens, greedily, past any end."""
    return {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
        "return_token_ids": True,
        **more,
    }


def _tokens_of(event: Mapping[str, Any]) -> int:
    return sum(len(choice["token_ids"]) for choice in event["choices"])


def _code_of(error: Any) -> str:
    from router.client import UnreachableError

    if isinstance(error, UnreachableError):
        return "unreachable"
    kind = str(error.code.name)
    is_bare = kind == SHED["gRPC"] and error.retry_after_s is None
    return kind + NO_HINT if is_bare else kind


def _status_of(answer: Any) -> str:
    kind = str(answer.status_code)
    is_bare = kind == SHED["HTTP"] and "retry-after" not in answer.headers
    return kind + NO_HINT if is_bare else kind


async def capacity_per_s(
    asker: Asker, clients: int, settle_s: float, seconds: float, stream: bool
) -> float:
    """Return the requests a second that ``clients`` get answered which each wait for their answer.

    The first ``settle_s`` do not count. Raises ``RuntimeError`` when one is not answered.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    end_s = settle_s + seconds
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        while (now_s := loop.time() - start_s) < end_s:
            answer = await asker.ask(number, now_s, start_s, stream)
            if not answer.is_answered:
                raise RuntimeError(f"{clients} clients at once: {answer.kind}")
            done += settle_s <= answer.ended_s < end_s
            number += 1

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return done / seconds


def kinds(answers: Iterable[Answer]) -> dict[str, dict[str, int]]:
    """Count answers by surface and kind."""
    counted: dict[str, Counter[str]] = {"gRPC": Counter(), "HTTP": Counter()}
    for answer in answers:
        counted[answer.surface][answer.kind] += 1
    return {surface: dict(some) for surface, some in counted.items()}


def late_ms(answers: Sequence[Answer]) -> dict[str, float]:
    """Return how late the requests were sent, which must be little: else the client is too slow."""
    return summary_ms([answer.sent_s - answer.due_s for answer in answers])
