"""What only the asynchronous client does; what both do is in ``test_client_resume.py``."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from router.client import AsyncClient, Sampling, UnreachableError
from tests.sync_client import FOLDER, synchronous
from tests.unit.gateway_fakes import STATUS, FakeUpstream, goes_on, grpc_server, says, tokenizer

TEXT = " was the word"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, within a time."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work

    return asyncio.run(bounded())


def test_one_client_carries_many_requests_at_once() -> None:
    async def ask(address: str) -> list[str]:
        async with AsyncClient(address) as client:

            async def one(n: int) -> str:
                replies = [reply async for reply in client.stream("in", Sampling(seed=n))]
                return "".join(reply.text for reply in replies)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(n)) for n in range(50)]
            return [task.result() for task in tasks]

    upstream = FakeUpstream(says(TEXT))
    with grpc_server(upstream) as address:
        assert run(ask(address)) == [TEXT] * 50
    assert sorted(one.sampling.seed for one in upstream.requests) == list(range(50))


def test_status_and_models_are_those_of_the_server() -> None:
    async def ask(address: str) -> Any:
        async with AsyncClient(address) as client:
            [tiny, bare] = await client.model_info()
            assert (tiny.id, bare.id) == ("tiny", "bare")
            assert await client.model_info("tiny") == [tiny]
            with pytest.raises(UnknownModelError, match="served: tiny, bare"):
                await client.model_info("nope")
            return await client.status()

    with grpc_server(FakeUpstream(says(TEXT))) as address:
        assert run(ask(address)) == STATUS


@pytest.mark.parametrize("streamed", [True, False])
def test_a_cancelled_task_cancels_its_request_at_the_server(streamed: bool) -> None:
    upstream = FakeUpstream(goes_on(TEXT, upto=1), endless=True)

    async def read(client: AsyncClient, begun: asyncio.Event) -> None:
        if not streamed:
            begun.set()
            await client.generate("in", model="tiny")
        async for _ in client.stream("in", model="tiny"):
            begun.set()

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            begun = asyncio.Event()
            task = asyncio.create_task(read(client, begun))
            await begun.wait()
            while not upstream.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(upstream.closed.wait, 10)

    with grpc_server(upstream) as address:
        run(ask(address))


def test_a_closed_stream_cancels_its_request_at_the_server() -> None:
    upstream = FakeUpstream(goes_on(TEXT, upto=1), endless=True)

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            async with aclosing(client.stream("in", model="tiny")) as replies:
                first = await anext(replies)
                assert first.token_ids == tuple(tokenizer().encode(TEXT)[:1])
            assert await asyncio.to_thread(upstream.closed.wait, 10)

    with grpc_server(upstream) as address:
        run(ask(address))


def test_closing_the_client_ends_its_calls_with_an_error_and_not_a_cancellation() -> None:
    upstream = FakeUpstream(goes_on(TEXT, upto=1), endless=True)

    async def ask(address: str) -> None:
        client = AsyncClient(address)
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

    with grpc_server(upstream) as address:
        run(ask(address))


def test_what_no_message_can_carry_is_refused_before_it_is_sent() -> None:
    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            for sampling in (Sampling(seed=2**63), Sampling(temperature="hot")):  # type: ignore
                with pytest.raises(InvalidRequestError, match="cannot be sent"):
                    await client.generate("in", sampling, model="tiny")

    run(ask("127.0.0.1:1"))


def test_the_synchronous_client_is_made_of_the_asynchronous_one() -> None:
    source, made = ((FOLDER / name).read_text() for name in ("aio.py", "sync.py"))
    assert made == synchronous(source), "python -m tests.sync_client"


def test_the_client_names_a_priority() -> None:
    upstream = FakeUpstream(goes_on(TEXT))

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.generate("in", priority=-1, cache_salt="s")
            assert [reply async for reply in client.stream("in", priority=3)]

    with grpc_server(upstream) as address:
        run(ask(address))
    assert [request.priority for request in upstream.requests] == [-1, 3]
    assert [request.cache_salt for request in upstream.requests] == ["s", ""]
