"""The gateway's upstream: what must hold without a Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from cluster.errors import DeadlineExceededError
from router.gateway import ray_upstream
from router.gateway.ray_upstream import Inbox, RayUpstream, _take
from router.link import LinkAddress
from router.request import (
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    merge_events,
)


def request(timeout_s: float) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        model="m",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1),
        deadline_s=time.time() + timeout_s,
    )


def event(start: int, finish_reason: str | None = None) -> TokenEvent:
    return TokenEvent(0, (start,), start=start, finish_reason=finish_reason)


@pytest.mark.parametrize("turns", range(5))
def test_a_cancellation_that_meets_a_token_is_not_swallowed(turns: int) -> None:
    async def run() -> None:
        inbox = Inbox()
        reading = asyncio.create_task(_take(inbox, request(30), 0.0))
        await asyncio.sleep(0.01)
        inbox.put(event(0))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = reading.done()
        assert reading.cancel() != was_done
        await asyncio.wait({reading}, timeout=5)
        assert reading.cancelled() != was_done

    asyncio.run(run())


def test_a_token_that_never_comes_ends_with_the_deadline() -> None:
    async def run() -> None:
        with pytest.raises(DeadlineExceededError):
            await _take(Inbox(), request(-1), 0.0)

    asyncio.run(run())


def test_the_first_token_is_told_at_once_and_those_in_the_pause_together() -> None:
    async def run() -> None:
        inbox, started_s = Inbox(), time.monotonic()
        inbox.put(event(0))
        assert await inbox.take(0.2) == ([event(0)], None)
        assert time.monotonic() - started_s < 0.1
        inbox.put(event(1))
        inbox.put(event(2))
        assert await inbox.take(0.2) == ([event(1), event(2)], None)
        assert time.monotonic() - started_s >= 0.2
        await asyncio.sleep(0.25)
        inbox.put(event(3))  # the pause is over
        assert await inbox.take(30) == ([event(3)], None)

    asyncio.run(run())


def test_an_end_does_not_wait_for_the_pause() -> None:
    async def run() -> None:
        inbox, error = Inbox(), RuntimeError()
        inbox.put(event(0))
        await inbox.take(30)
        inbox.put(event(1))
        inbox.put(event(2, "length"))
        async with asyncio.timeout(5):
            assert await inbox.take(30) == ([event(1), event(2, "length")], None)
            inbox.put(event(3))
            inbox.end(error)
            assert await inbox.take(30) == ([event(3)], error)

    asyncio.run(run())


def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_upstream, "MAX_BUFFERED_EVENTS", 2)

    async def run() -> None:
        inbox = Inbox()
        for start in range(5):
            inbox.put(event(start))
        assert await inbox.take(0) == ([event(0), event(1)], None)

    asyncio.run(run())


class Call:
    """A router's call under way; ``reply`` is its future."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.was_cancelled = False

    def __await__(self) -> Any:
        return self.reply.__await__()

    def cancel(self) -> None:
        self.was_cancelled = True


class Router:
    """A handle whose ``generate.remote`` starts a :class:`Call`."""

    def __init__(self) -> None:
        self.generate = self
        self.calls: list[Call] = []

    def remote(self, wire: dict[str, Any], address: LinkAddress) -> Call:
        self.calls.append(Call())
        return self.calls[-1]


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[RayUpstream, Router]]:
    """Makes, in a running loop, an upstream with one router and without a controller."""
    monkeypatch.setattr(ray_upstream, "PlacementWatcher", lambda *_: None)
    monkeypatch.setattr(ray_upstream.ray.util, "get_node_ip_address", lambda: "127.0.0.1")

    def make() -> tuple[RayUpstream, Router]:
        router = Router()
        return RayUpstream(None, {"m": router}), router  # type: ignore[arg-type, dict-item]

    return make


async def first_of(
    gateway: RayUpstream,
    router: Router,
    events: AsyncGenerator[TokenEvent, None],
    early: TokenEvent,
) -> TokenEvent:
    """Let the call begin and ``early`` come over the link; returns what is passed on."""
    first = asyncio.ensure_future(anext(events))
    async with asyncio.timeout(5):
        while not router.calls:
            await asyncio.sleep(0.001)
        gateway._on_tokens("r#0", early)
        return await first


@pytest.mark.parametrize("reason", ["length", None])
def test_a_call_is_cancelled_only_while_tokens_are_missing(
    upstream: Callable[[], tuple[RayUpstream, Router]], reason: str | None
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        assert await first_of(gateway, router, events, event(0, reason)) == event(0, reason)
        await events.aclose()
        assert router.calls[0].was_cancelled == (reason is None)
        if reason is not None:
            router.calls[0].reply.set_result({"events": []})
            await asyncio.sleep(0.01)
        assert not gateway._leaving
        gateway._link.close()

    asyncio.run(run())


def test_a_request_that_is_cancelled_at_once_takes_no_other_along(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        gone = asyncio.ensure_future(anext(gateway.generate(request(30))))
        await asyncio.sleep(0)  # lets it begin to wait for the link's server
        gone.cancel()
        await asyncio.wait({gone})
        assert not router.calls
        events = gateway.generate(request(30))
        assert await first_of(gateway, router, events, event(0)) == event(0)
        await events.aclose()
        assert not gateway._inboxes
        assert gateway._num_streams == 0
        gateway._link.close()

    asyncio.run(run())


def test_the_reply_completes_what_came_early(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    whole = TokenEvent(0, (0, 1, 2), finish_reason="length")

    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        first = await first_of(gateway, router, events, event(0))
        gateway._on_tokens("r#0", event(1))
        router.calls[0].reply.set_result({"events": [whole.to_wire()]})
        rest = [piece async for piece in events]
        assert merge_events([first, *rest]) == [whole]
        assert not router.calls[0].was_cancelled
        gateway._link.close()

    asyncio.run(run())


def test_joined_events_keep_their_order_and_what_any_of_them_says() -> None:
    rows = [TokenLogprobs(-float(i), (), ()) for i in range(3)]
    events = [
        TokenEvent(1, (4,), (rows[0],), start=2),
        TokenEvent(0, (7,), (), start=5),
        TokenEvent(1, (5,), (rows[1],), exact=False, start=3),
        TokenEvent(1, (6,), (rows[2],), "stop", start=4),
    ]
    assert merge_events(events) == [
        TokenEvent(0, (7,), (), start=5),
        TokenEvent(1, (4, 5, 6), tuple(rows), "stop", False, 2),
    ]
