"""Load on a running server: requests at once, and what is measured of them.

All times are as a client sees them, by its own clock; the client takes its share of the machine.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ExpertMeshError
from router.client import AsyncClient, Sampling, UnreachableError

MAX_SAMPLES = 100_000


class Samples:
    """Durations, of which percentiles are wanted.

    Exact up to ``limit`` of them; beyond, an even sample of that size is kept (Vitter's
    algorithm R, "Random Sampling with a Reservoir", 1985).
    """

    def __init__(self, limit: int = MAX_SAMPLES) -> None:
        self._limit = limit
        self._seen = 0
        self._kept: list[float] = []
        self._random = random.Random(0)

    def add(self, value_s: float) -> None:
        """Take one duration."""
        self._seen += 1
        if len(self._kept) < self._limit:
            self._kept.append(value_s)
        elif (place := self._random.randrange(self._seen)) < self._limit:
            self._kept[place] = value_s

    def percentile_ms(self, percent: float) -> float | None:
        """Return the smallest duration that so many percent do not exceed, in milliseconds."""
        if not self._kept:
            return None
        ranked = sorted(self._kept)
        place = max(0, -(-len(ranked) * percent // 100) - 1)  # nearest rank, rounded up
        return ranked[int(place)] * 1000


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask: ``requests`` in all, ``clients`` at once, the prompts in turn."""

    prompts: Sequence[str | Sequence[int]]
    sampling: Sampling
    model: str
    clients: int
    requests: int
    streamed: bool
    timeout_s: float


@dataclass(slots=True)
class Failures:
    """How often one kind of failure came, and the words of the first."""

    count: int
    first: str


@dataclass(slots=True)
class Measured:
    """What has been measured so far; whole or, when it was interrupted, in part.

    A piece of several tokens counts as many equal times between tokens. What is not streamed has
    no first token and no times between tokens.
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
        return sum(one.count for one in self.failures.values())

    def failed_with(self, error: ExpertMeshError) -> None:
        """Count a failure by its kind."""
        is_silence = isinstance(error, UnreachableError)
        kind = "unreachable" if is_silence else error.code.value
        self.failures.setdefault(kind, Failures(0, str(error))).count += 1

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; rates are per second, times in milliseconds."""
        elapsed_s = self.elapsed_s or 1.0  # nothing was done in no time

        def percentiles(samples: Samples) -> dict[str, float | None]:
            return {f"p{percent}": samples.percentile_ms(percent) for percent in (50, 99)}

        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "failures": {
                kind: {"count": one.count, "first": one.first}
                for kind, one in sorted(self.failures.items())
            },
            "elapsed_s": self.elapsed_s,
            "output_tokens": self.output_tokens,
            "tokens_per_s": self.output_tokens / elapsed_s,
            "requests_per_s": self.succeeded / elapsed_s,
            "first_token_ms": percentiles(self.first_token),
            "between_tokens_ms": percentiles(self.between_tokens),
            "request_ms": percentiles(self.whole),
        }


async def put_load(
    address: str, load: Load, measured: Measured, on_end: Callable[[], None]
) -> None:
    """Ask everything once, without retries; ``on_end`` is called after each request.

    Fills ``measured``, so that what is there when the task is cancelled is not lost.
    """
    started_s = time.monotonic()
    left = iter(range(load.requests))
    try:
        async with AsyncClient(address, retry=None) as client, asyncio.TaskGroup() as group:
            for _ in range(min(load.clients, load.requests)):
                group.create_task(_one_client(client, load, left, measured, on_end))
    finally:
        measured.elapsed_s = time.monotonic() - started_s


async def _one_client(
    client: AsyncClient,
    load: Load,
    left: Iterator[int],
    measured: Measured,
    on_end: Callable[[], None],
) -> None:
    for number in left:
        prompt = load.prompts[number % len(load.prompts)]
        started_s = time.monotonic()
        try:
            await (_stream if load.streamed else _generate)(client, load, prompt, measured)
        except ExpertMeshError as error:
            measured.failed_with(error)
        else:
            measured.succeeded += 1
            measured.whole.add(time.monotonic() - started_s)
        on_end()


async def _generate(
    client: AsyncClient, load: Load, prompt: str | Sequence[int], measured: Measured
) -> None:
    replies = await client.generate(
        prompt, load.sampling, model=load.model, timeout_s=load.timeout_s
    )
    measured.output_tokens += sum(len(reply.token_ids) for reply in replies)


async def _stream(
    client: AsyncClient, load: Load, prompt: str | Sequence[int], measured: Measured
) -> None:
    before_s = time.monotonic()
    is_first = True
    pieces = client.stream(prompt, load.sampling, model=load.model, timeout_s=load.timeout_s)
    async with aclosing(pieces):
        async for piece in pieces:
            count = len(piece.token_ids)
            if not count:
                continue
            now_s = time.monotonic()
            measured.output_tokens += count
            if is_first:
                measured.first_token.add(now_s - before_s)
                is_first = False
            else:
                for _ in range(count):
                    measured.between_tokens.add((now_s - before_s) / count)
            before_s = now_s
