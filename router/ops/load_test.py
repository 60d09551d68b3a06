"""Runs a load test: sends concurrent requests to a running server and measures the answers.

All times are a client's, by its own clock. The client itself uses a share of the machine.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.errors import ExpertMeshError
from router.client import AsyncClient, Sampling, UnreachableError

MAX_SAMPLES = 100_000


class Samples:
    """Percentiles of durations.

    They are exact up to ``limit`` durations. Beyond, they come from an even sample of that size
    (Vitter's algorithm R, "Random Sampling with a Reservoir", 1985).
    """

    def __init__(self, limit: int = MAX_SAMPLES) -> None:
        self._limit = limit
        self._seen = 0
        self._kept: list[float] = []
        self._random = random.Random(0)

    def add(self, value_s: float) -> None:
        """Add a duration."""
        self._seen += 1
        if len(self._kept) < self._limit:
            self._kept.append(value_s)
        elif (index := self._random.randrange(self._seen)) < self._limit:
            self._kept[index] = value_s

    def percentile_ms(self, percent: float) -> float | None:
        """Return the duration in milliseconds that ``percent`` of all do not exceed, if any."""
        if not self._kept:
            return None
        ranked = sorted(self._kept)
        index = max(0, -(-len(ranked) * percent // 100) - 1)  # nearest rank, rounded up
        return ranked[int(index)] * 1000


@dataclass(frozen=True, slots=True)
class LoadTest:
    """The requests of a load test: ``requests`` in all, ``clients`` at once, prompts in turn."""

    prompts: Sequence[str | Sequence[int]]
    sampling: Sampling
    model: str
    clients: int
    requests: int
    streamed: bool
    timeout_s: float


@dataclass(slots=True)
class Failures:
    """The number of failures of one kind, and the message of the first."""

    count: int
    first: str


@dataclass(slots=True)
class Results:
    """The measurements of a load test up to now, so that an interrupted test has results too.

    A piece of n tokens counts as n equal times between tokens. An answer that is not streamed has
    no time to the first token and no times between tokens.
    """

    elapsed_s: float = 0.0
    succeeded: int = 0
    output_tokens: int = 0
    whole: Samples = field(default_factory=Samples)
    first_token: Samples = field(default_factory=Samples)
    between_tokens: Samples = field(default_factory=Samples)
    failures: dict[str, Failures] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """The number of requests that failed."""
        return sum(failures.count for failures in self.failures.values())

    def add_failure(self, error: ExpertMeshError) -> None:
        """Count a failure by its kind."""
        kind = "unreachable" if isinstance(error, UnreachableError) else error.code.value
        self.failures.setdefault(kind, Failures(0, str(error))).count += 1

    def to_json(self) -> dict[str, Any]:
        """Return the results as plain data; rates are per second, times in milliseconds."""
        elapsed_s = self.elapsed_s or 1.0  # a test that did not start has rates of 0

        def percentiles(samples: Samples) -> dict[str, float | None]:
            return {f"p{percent}": samples.percentile_ms(percent) for percent in (50, 99)}

        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "failures": {
                kind: asdict(failures) for kind, failures in sorted(self.failures.items())
            },
            "elapsed_s": self.elapsed_s,
            "output_tokens": self.output_tokens,
            "tokens_per_s": self.output_tokens / elapsed_s,
            "requests_per_s": self.succeeded / elapsed_s,
            "first_token_ms": percentiles(self.first_token),
            "between_tokens_ms": percentiles(self.between_tokens),
            "request_ms": percentiles(self.whole),
        }


async def run_load_test(
    address: str,
    api_key: str | None,
    test: LoadTest,
    results: Results,
    on_end: Callable[[], None],
) -> None:
    """Send each request once, without retries; call ``on_end`` after each.

    Fills ``results`` on the way, so that a cancelled test keeps its measurements.
    """
    started_at_s = time.monotonic()
    numbers = iter(range(test.requests))
    try:
        async with _client(address, api_key) as client, asyncio.TaskGroup() as group:
            for _ in range(min(test.clients, test.requests)):
                group.create_task(_run_client(client, test, numbers, results, on_end))
    finally:
        results.elapsed_s = time.monotonic() - started_at_s


def _client(address: str, api_key: str | None) -> AsyncClient:
    return AsyncClient(address, retry=None, api_key=api_key)


async def _run_client(
    client: AsyncClient,
    test: LoadTest,
    numbers: Iterator[int],
    results: Results,
    on_end: Callable[[], None],
) -> None:
    """Send one request after the other, as long as the clients' shared ``numbers`` last."""
    for number in numbers:
        prompt = test.prompts[number % len(test.prompts)]
        started_at_s = time.monotonic()
        try:
            await (_stream if test.streamed else _generate)(client, test, prompt, results)
        except ExpertMeshError as error:
            results.add_failure(error)
        else:
            results.succeeded += 1
            results.whole.add(time.monotonic() - started_at_s)
        on_end()


async def _generate(
    client: AsyncClient, test: LoadTest, prompt: str | Sequence[int], results: Results
) -> None:
    replies = await client.generate(
        prompt, test.sampling, model=test.model, timeout_s=test.timeout_s
    )
    results.output_tokens += sum(len(reply.token_ids) for reply in replies)


async def _stream(
    client: AsyncClient, test: LoadTest, prompt: str | Sequence[int], results: Results
) -> None:
    last_at_s = time.monotonic()
    is_first = True
    pieces = client.stream(prompt, test.sampling, model=test.model, timeout_s=test.timeout_s)
    async with aclosing(pieces):
        async for piece in pieces:
            count = len(piece.token_ids)
            if not count:
                continue
            now_s = time.monotonic()
            results.output_tokens += count
            if is_first:
                results.first_token.add(now_s - last_at_s)
                is_first = False
            else:
                for _ in range(count):
                    results.between_tokens.add((now_s - last_at_s) / count)
            last_at_s = now_s
