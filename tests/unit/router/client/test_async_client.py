"""What only the asynchronous client does; what both do is in ``test_client_resume.py``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from cluster.errors import InvalidRequestError
from router.client import AsyncClient, Sampling, UnreachableError
from tests.sync_client import FOLDER, synchronous
from tests.unit.gateway_fakes import STATUS, FakeUpstream, goes_on, grpc_server, says, tokenizer

TEXT = " was the word"


@pytest.fixture
def upstream() -> FakeUpstream:
    """Its streams stay open after a token."""
    return FakeUpstream(goes_on(TEXT, upto=1), endless=True)


@pytest.fixture
def endless(upstream: FakeUpstream) -> Iterator[str]:
    with grpc_server(upstream) as address:
        yield address


async def test_one_client_carries_many_requests_at_once() -> None:
    upstream = FakeUpstream(says(TEXT))
    with grpc_server(upstream) as address:
        async with AsyncClient(address) as client:

            async def ask(n: int) -> str:
                stream = client.stream("in", Sampling(seed=n), priority=n, cache_salt=str(n))
                return "".join([reply.text async for reply in stream])

            assert await asyncio.gather(*map(ask, range(50))) == [TEXT] * 50
            await client.generate("in", Sampling(seed=50), priority=50, cache_salt="50")
            assert await client.status() == STATUS
    asked = [(one.sampling.seed, one.priority, one.cache_salt) for one in upstream.requests]
    assert sorted(asked) == [(n, n, str(n)) for n in range(51)]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_cancelled_task_cancels_its_request_at_the_server(
    upstream: FakeUpstream, endless: str, streamed: bool
) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        if not streamed:
            begun.set()
            await client.generate("in", model="tiny")
        async for _ in client.stream("in", model="tiny"):
            begun.set()

    async with AsyncClient(endless) as client:
        task = asyncio.create_task(read())
        await begun.wait()
        while not upstream.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(upstream.closed.wait, 10)


async def test_a_closed_stream_cancels_its_request_at_the_server(
    upstream: FakeUpstream, endless: str
) -> None:
    async with AsyncClient(endless) as client:
        async with aclosing(client.stream("in", model="tiny")) as replies:
            first = await anext(replies)
            assert first.token_ids == tuple(tokenizer().encode(TEXT)[:1])
        assert await asyncio.to_thread(upstream.closed.wait, 10)


async def test_closing_the_client_ends_its_calls_with_an_error_and_not_a_cancellation(
    upstream: FakeUpstream, endless: str
) -> None:
    client = AsyncClient(endless)
    replies = client.stream("in", model="tiny")
    await anext(replies)
    whole = asyncio.create_task(client.generate("in", model="tiny"))
    while len(upstream.requests) < 2:
        await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(UnreachableError):
        await anext(replies)
    with pytest.raises(UnreachableError):
        await whole


async def test_what_no_message_can_carry_is_refused_before_it_is_sent() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        for sampling in (Sampling(seed=2**63), Sampling(temperature="hot")):  # type: ignore
            with pytest.raises(InvalidRequestError, match="cannot be sent"):
                await client.generate("in", sampling, model="tiny")
        with pytest.raises(TypeError, match="a request has no option salt"):
            await client.generate("in", model="tiny", salt="a")  # type: ignore[call-arg]


def test_the_synchronous_client_is_made_of_the_asynchronous_one() -> None:
    source, made = ((FOLDER / name).read_text() for name in ("aio.py", "sync.py"))
    assert made == synchronous(source), "python -m tests.sync_client"
