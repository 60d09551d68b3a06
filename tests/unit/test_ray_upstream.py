"""The gateway's upstream: what must hold without a Ray cluster."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.errors import DeadlineExceededError
from router.gateway.ray_upstream import _get
from router.request import GenerationRequest, SamplingParams, TokenEvent


def request(timeout_s: float) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        model="m",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1),
        deadline_s=time.time() + timeout_s,
    )


@pytest.mark.parametrize("turns", range(5))
def test_a_cancellation_that_meets_a_token_is_not_swallowed(turns: int) -> None:
    async def run() -> None:
        stream: asyncio.Queue = asyncio.Queue()
        reading = asyncio.create_task(_get(stream, request(30)))
        await asyncio.sleep(0.01)
        stream.put_nowait(TokenEvent(0, (1,), (), None))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = reading.done()
        assert reading.cancel() != was_done
        await asyncio.wait({reading}, timeout=5)
        assert reading.cancelled() != was_done

    asyncio.run(run())


def test_a_token_that_never_comes_ends_with_the_deadline() -> None:
    with pytest.raises(DeadlineExceededError):
        asyncio.run(_get(asyncio.Queue(), request(-1)))
