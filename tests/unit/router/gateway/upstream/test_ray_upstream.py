"""The gateway's upstream: what must hold without a Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import Span
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
)

from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from cluster.placement.placement import empty_placement
from cluster.reports import Samples
from cluster.spec import ModelExperts
from router.gateway.output import inbox as inbox_module
from router.gateway.output.inbox import Inbox
from router.gateway.upstream import deployment as deployment_module
from router.gateway.upstream import ray_upstream
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.ray_upstream import RESUMED_TIMES, RayUpstream
from router.messages.call_link import LinkBrokenError
from router.messages.link import LinkAddress
from router.messages.receipts import merge_events
from router.messages.request import (
    GenerationRequest,
    PromptLogprobs,
    Received,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from router.observability.tracing import as_current
from router.retry import RetryBudget, RetryPolicy
from tests.span_keeper import SpanKeeper

MAX_HELD = 3


def request(timeout_s: float) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        model="m",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1),
        deadline_s=time.monotonic() + timeout_s,
    )


def event(start: int, finish_reason: str | None = None) -> TokenEvent:
    return TokenEvent(0, (start,), start=start, finish_reason=finish_reason)


@pytest.mark.parametrize("turns", range(5))
def test_a_cancellation_that_meets_a_token_is_not_swallowed(turns: int) -> None:
    async def run() -> None:
        inbox = Inbox()
        reading = asyncio.create_task(inbox.take(0.0))
        await asyncio.sleep(0.01)
        inbox.put(event(0))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = reading.done()
        assert reading.cancel() != was_done
        await asyncio.wait({reading}, timeout=5)
        assert reading.cancelled() != was_done

    asyncio.run(run())


def test_the_first_token_is_told_at_once_and_those_in_the_pause_together() -> None:
    async def run() -> None:
        inbox, started_s = Inbox(), asyncio.get_running_loop().time()
        inbox.put(event(0))
        first = asyncio.create_task(inbox.take(0.2))
        await asyncio.sleep(0)
        assert first.done()
        assert first.result() == ([event(0)], None)
        inbox.put(event(1))
        inbox.put(event(2))
        assert await inbox.take(0.2) == ([event(1), event(2)], None)
        assert asyncio.get_running_loop().time() >= (started_s // 0.2 + 1) * 0.2
        await asyncio.sleep(0.25)
        inbox.put(event(3))  # the pause is over
        assert await inbox.take(30) == ([event(3)], None)

    asyncio.run(run())


def test_readers_that_begin_at_any_time_are_woken_at_the_same_one() -> None:
    async def run() -> None:
        due: list[tuple[float, Callable[[], None]]] = []
        inboxes = []
        for now_s in (10.25, 10.375, 10.5, 10.75):
            inbox = Inbox()
            inbox._loop = SimpleNamespace(
                time=partial(float, now_s), call_at=lambda at_s, call: due.append((at_s, call))
            )
            inbox.put(event(0))
            assert await inbox.take(0.5) == ([event(0)], None)
            inbox.put(event(1))
            inboxes.append(inbox)
        assert [at_s for at_s, _ in due] == [10.5, 10.5, 11.0, 11.0]
        for _, wake in due:
            wake()
        for inbox in inboxes:
            async with asyncio.timeout(5):
                assert await inbox.take(0.0) == ([event(1)], None)
                inbox.put(event(2))  # without a pause there is nothing to wait for
                assert await inbox.take(0.5) == ([event(2)], None)

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


def test_what_comes_while_the_reader_is_busy_comes_as_one(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(replace(request(30), sampling=SamplingParams(999)))
        await first_of(gateway, router, events, event(0))
        for start in range(1, 500):
            gateway._on_tokens("r#0", event(start))
            await asyncio.sleep(0)
        assert await anext(events) == TokenEvent(0, tuple(range(1, 500)), start=1)
        gateway._on_tokens("r#0", event(500))
        assert await anext(events) == event(500)
        await events.aclose()
        gateway._link.close()

    asyncio.run(run())


def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_BUFFERED_EVENTS", 2)

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
    """Stands in for :class:`router.gateway.upstream.router_links.RouterCalls`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.wires: list[dict[str, Any]] = []
        self.spans: list[Span] = []
        self.by_serve: list[bool] = []
        self.addresses: list[LinkAddress] = []

    def on_node(self, hear: Callable[[str], None]) -> None:
        self.tell_node = hear

    def call(self, wire: dict[str, Any], span: Span, by_serve: bool) -> Call:
        self.addresses.append(LinkAddress.from_wire(wire["address"]))
        self.wires.append(wire["request"])
        self.spans.append(span)
        self.by_serve.append(by_serve)
        self.calls.append(Call())
        return self.calls[-1]


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[RayUpstream, Router]]:
    """Makes, in a running loop, an upstream with one router and without a controller."""
    monkeypatch.setattr(deployment_module, "PlacementWatcher", lambda *_, **__: None)
    monkeypatch.setattr(ray_upstream.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray_upstream.ray, "get_runtime_context", lambda: context)
    nodes = [{"NodeID": "here", "Alive": True}, {"NodeID": "gone", "Alive": False}]
    monkeypatch.setattr(ray_upstream.ray, "nodes", lambda: nodes)

    def make() -> tuple[RayUpstream, Router]:
        router = Router()
        samples = Samples(0.0, {})
        routers: Any = {"m": router}
        deployment = Deployment(
            None,
            routers,
            "strict",
            lambda: True,
            lambda: False,
            lambda: samples,
            lambda uses: None,
        )
        return RayUpstream(deployment, routers, MAX_HELD), router

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


def test_a_router_that_goes_silent_is_given_up_after_the_deadline(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.05)

    async def run() -> None:
        gateway, router = upstream()
        asked = replace(request(0.1), sampling=SamplingParams(9))
        events = gateway.generate(asked)
        assert await first_of(gateway, router, events, event(0)) == event(0)
        gateway._on_tokens("r#0", event(1))
        assert await anext(events) == event(1)
        assert asked.remaining_s() > 0
        with pytest.raises(DeadlineExceededError, match="before its last token"):
            await anext(events)
        assert asked.remaining_s() <= -0.04
        assert router.calls[0].was_cancelled
        assert len(router.calls) == 1
        gateway._link.close()

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_reads_on_past_the_deadline_gets_what_came_before_it(
    upstream: Callable[[], tuple[RayUpstream, Router]],
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.0)

    async def run() -> None:
        gateway, router = upstream()
        asked = replace(request(0.1), sampling=SamplingParams(2))
        events = gateway.generate(asked)
        assert await first_of(gateway, router, events, event(0)) == event(0)
        whole = TokenEvent(0, (0, 1), finish_reason="length")
        refusal = {"error": OverloadedError("full", "queue", 1.0).to_wire()}
        router.calls[0].reply.set_result(refusal if fails else {"events": [whole.to_wire()]})
        while asked.remaining_s() > -0.05:
            await asyncio.sleep(0.01)
        if fails:
            with pytest.raises(OverloadedError, match="full"):
                await anext(events)
        else:
            assert await anext(events) == event(1, "length")
            await events.aclose()
        gateway._link.close()

    asyncio.run(run())


def test_a_request_that_ends_leaves_no_timer(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(Inbox, "expire", lambda inbox, error: ended.append(error))
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.0)

    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(0.05))
        await first_of(gateway, router, events, event(0, "length"))
        await events.aclose()
        await asyncio.sleep(0.1)
        assert ended == []
        gateway._link.close()

    asyncio.run(run())


def test_a_call_knows_the_span_of_its_request(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = SpanKeeper()
    monkeypatch.setattr(trace, "get_tracer", spans.provider.get_tracer)

    async def run() -> None:
        gateway, router = upstream()
        serves = spans.tracer.start_span("serve")
        with as_current(serves):
            events = gateway.generate(request(30))
            assert await first_of(gateway, router, events, event(0, "length")) == event(0, "length")
            assert trace.get_current_span() is serves
            await events.aclose()
        [told] = spans.told()
        assert told.parent == serves.get_span_context()
        assert told.attributes["gen_ai.usage.output_tokens"] == 1
        assert [span.get_span_context() for span in router.spans] == [told.context]
        gateway._link.close()

    asyncio.run(run())


def test_routers_of_other_nodes_can_connect_once_there_is_one(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(gateway: RayUpstream, router: Router) -> LinkAddress:
        events = gateway.generate(request(30))
        await first_of(gateway, router, events, event(0, "length"))
        await events.aclose()
        router.calls.clear()
        return router.addresses.pop()

    async def run() -> None:
        gateway, router = upstream()
        alone = await told(gateway, router)
        assert (alone.node, bool(alone.name), alone.port) == ("here", True, 0)
        router.tell_node("here")
        assert await told(gateway, router) == alone
        router.tell_node("there")
        both = await told(gateway, router)
        assert (both.name, both.host, both.port > 0) == (alone.name, "127.0.0.1", True)
        gateway._link.close()

        two = [{"NodeID": "here", "Alive": True}, {"NodeID": "there", "Alive": True}]
        monkeypatch.setattr(ray_upstream.ray, "nodes", lambda: two)
        gateway, router = upstream()
        await gateway._looking
        assert (await told(gateway, router)).port
        gateway._link.close()

        def fail() -> None:
            raise RaySystemError("Ray's head does not answer")

        monkeypatch.setattr(ray_upstream.ray, "nodes", fail)
        gateway, router = upstream()
        await gateway._looking
        assert (await told(gateway, router)).port == 0
        router.tell_node("there")
        assert (await told(gateway, router)).port
        gateway._link.close()

    asyncio.run(run())


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
        await asyncio.sleep(0)  # lets it open the link's server, and call
        gone.cancel()
        await asyncio.wait({gone})
        assert router.calls.pop().was_cancelled
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


async def called(router: Router, count: int) -> None:
    """Wait until so many calls have been made."""
    async with asyncio.timeout(10):
        while len(router.calls) < count:
            await asyncio.sleep(0.001)


def received_at(router: Router, number: int) -> list[tuple[tuple[int, ...], bool]]:
    """What the call says that its client has, per choice."""
    sent = GenerationRequest.from_wire(router.wires[number])
    return [(one.token_ids, one.finished) for one in sent.received]


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_request_whose_router_dies_goes_on_at_another_from_what_was_passed_on(
    upstream: Callable[[], tuple[RayUpstream, Router]], deaths: int
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        asked = replace(request(30), sampling=SamplingParams(max_tokens=9, n=3))
        events = gateway.generate(asked)
        got: list[TokenEvent] = []
        reading = asyncio.ensure_future(_read_all(events, got))
        for death in range(deaths):
            await called(router, death + 1)
            expected = [((*range(death),), False), ((5,), True), ((), True)]
            if death > 0:
                assert received_at(router, death) == expected
            wire_id = f"r#{death}"
            gateway._on_tokens(wire_id, TokenEvent(0, (death,), start=death))
            gateway._on_tokens(wire_id, TokenEvent(1, (5,), finish_reason="stop"))
            gateway.stop("r", 2)  # the gateway found a stop string
            while len(got) < death + 2:
                await asyncio.sleep(0.001)
            router.calls[death].reply.set_exception(RayActorError())
        await called(router, deaths + 1)
        gateway._on_tokens("r#0", TokenEvent(0, (99,), start=deaths))  # too late: not wanted
        rest = TokenEvent(0, (deaths, 77), finish_reason="length", start=deaths)
        router.calls[deaths].reply.set_result({"events": [rest.to_wire()]})
        async with asyncio.timeout(10):
            await reading
        assert merge_events(got) == [
            TokenEvent(0, (*range(deaths + 1), 77), finish_reason="length"),
            TokenEvent(1, (5,), finish_reason="stop"),
        ]
        gateway._link.close()

    asyncio.run(run())


class CrashedError(ActorDiedError):
    """Ray's error of a process that ended by itself."""

    def __str__(self) -> str:
        return "The actor is dead because its worker process has died. Connection closed."


class StoppedError(ActorDiedError):
    """Ray's error of a replica that Serve has ended."""

    def __str__(self) -> str:
        return "The actor is dead because it was killed by `ray.kill`."


@dataclass
class Resends:
    """One request, of which each router dies."""

    gateway: RayUpstream
    router: Router
    number: int = 0

    async def dies(self, error: BaseException, alone: tuple[bool, ...] = ()) -> GenerationRequest:
        """Let the request's router die; returns what it was asked."""
        await called(self.router, self.number + 1)
        for is_alone in alone:
            self.gateway._on_alone(f"r#{self.number}", is_alone)
        sent = GenerationRequest.from_wire(self.router.wires[self.number])
        self.router.calls[self.number].reply.set_exception(error)
        self.number += 1
        return sent


def test_a_request_that_ends_its_routers_is_tried_alone_and_then_fails(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        asked = replace(request(30), streamed=False)
        reading = asyncio.ensure_future(_read_all(gateway.generate(asked), []))
        resends = Resends(gateway, router)
        sent = [await resends.dies(e) for e in (CrashedError(), OutOfMemoryError("no memory"))]
        sent.append(await resends.dies(CrashedError(), (True, False, True)))
        with pytest.raises(PoisonedRequestError, match="died while computing only this request"):
            await asyncio.wait_for(reading, 10)
        assert [s.alone for s in sent] == [False, False, True]
        assert [s.streamed for s in sent] == [False, True, True]
        assert len(router.calls) == 3
        gateway._link.close()

    asyncio.run(run())


def test_serve_carries_a_request_whose_link_broke_and_that_counts_as_a_death(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        reading = asyncio.ensure_future(_read_all(gateway.generate(request(30)), []))
        resends = Resends(gateway, router)
        sent = [await resends.dies(e) for e in (LinkBrokenError("it is cut"), CrashedError())]
        sent.append(await resends.dies(CrashedError(), (True,)))
        with pytest.raises(PoisonedRequestError, match="died while computing only this request"):
            await asyncio.wait_for(reading, 10)
        assert [s.alone for s in sent] == [False, False, True]
        assert router.by_serve == [False, True, True]
        gateway._link.close()

    asyncio.run(run())


def test_a_request_that_saw_others_end_its_routers_is_not_failed(
    upstream: Callable[[], tuple[RayUpstream, Router]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Routers die while it waits for its turn, or after it; Serve stops one; it makes progress."""
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))
    whole = TokenEvent(0, (0, 1), finish_reason="length")

    async def run() -> None:
        gateway, router = upstream()
        got: list[TokenEvent] = []
        reading = asyncio.ensure_future(_read_all(gateway.generate(request(30)), got))
        resends = Resends(gateway, router)
        errors = (CrashedError(), StoppedError(), RayActorError(), NodeDiedError("the node died"))
        sent = [await resends.dies(error) for error in errors]
        sent.append(await resends.dies(CrashedError()))
        sent.append(await resends.dies(CrashedError()))
        sent.append(await resends.dies(CrashedError(), (True, False)))
        sent.append(await resends.dies(StoppedError(), (True,)))
        await called(router, resends.number + 1)
        gateway._on_tokens(f"r#{resends.number}", event(0))
        while not got:
            await asyncio.sleep(0.001)
        sent.append(await resends.dies(CrashedError(), (True, False)))
        await called(router, resends.number + 1)
        last = GenerationRequest.from_wire(router.wires[resends.number])
        router.calls[resends.number].reply.set_result({"events": [whole.to_wire()]})
        await asyncio.wait_for(reading, 10)
        assert merge_events(got) == [whole]
        assert [s.alone for s in sent] == [False] * 5 + [True] * 4
        assert not last.alone  # a token came since
        gateway._link.close()

    asyncio.run(run())


def test_a_request_that_ends_its_routers_before_they_compute_it_fails_in_the_end(
    upstream: Callable[[], tuple[RayUpstream, Router]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))

    async def run() -> None:
        gateway, router = upstream()
        reading = asyncio.ensure_future(_read_all(gateway.generate(request(30)), []))
        resends = Resends(gateway, router)
        for _ in range(6):
            await resends.dies(CrashedError())
        with pytest.raises(PoisonedRequestError, match="6 routers in a row died"):
            await asyncio.wait_for(reading, 10)
        assert len(router.calls) == 6
        gateway._link.close()

    asyncio.run(run())


async def _read_all(events: AsyncGenerator[TokenEvent, None], into: list[TokenEvent]) -> None:
    async for one in events:
        into.append(one)


def overloaded(retry_after_s: float | None) -> dict[str, Any]:
    return {"error": OverloadedError("full", "queue", retry_after_s).to_wire()}


def test_a_full_queue_refuses_a_new_request_but_not_one_that_was_accepted(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    whole = TokenEvent(0, (1,), finish_reason="length")

    async def run() -> None:
        gateway, router = upstream()
        got: list[TokenEvent] = []
        refused = asyncio.ensure_future(_read_all(gateway.generate(request(30)), got))
        await called(router, 1)
        router.calls[0].reply.set_result(overloaded(0.01))
        with pytest.raises(OverloadedError):
            await refused
        accepted = asyncio.ensure_future(_read_all(gateway.generate(request(30)), got))
        await called(router, 2)
        router.calls[1].reply.set_exception(RayActorError())
        await called(router, 3)
        router.calls[2].reply.set_result(overloaded(0.01))
        await called(router, 4)
        router.calls[3].reply.set_result({"events": [whole.to_wire()]})
        await accepted
        assert got == [whole]
        gateway._link.close()

    asyncio.run(run())


def test_no_request_is_sent_again_past_its_deadline_or_the_budget(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run(timeout_s: float, budget: RetryBudget) -> None:
        gateway, router = upstream()
        gateway._budget = budget
        reading = asyncio.ensure_future(_read_all(gateway.generate(request(timeout_s)), []))
        await called(router, 1)
        router.calls[0].reply.set_exception(RayActorError())
        with pytest.raises(UnavailableError) as caught:
            await reading
        assert caught.value.retry_after_s == 1.0
        assert len(router.calls) == 1
        gateway._link.close()

    asyncio.run(run(-0.1, RetryBudget()))
    asyncio.run(run(30, RetryBudget(max_tokens=1)))


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


def test_a_deletion_ends_all_requests_and_takes_no_more(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        assert await first_of(gateway, router, events, event(0)) == event(0)
        gateway._deployment.end_requests()
        with pytest.raises(UnavailableError, match="deleted"):
            await anext(events)
        assert router.calls[0].was_cancelled
        with pytest.raises(UnavailableError, match="deleted"):
            await anext(gateway.generate(request(30)))
        assert len(router.calls) == 1
        told = gateway.ready()
        assert (told.is_ready, told.is_deleted) == (False, True)

    asyncio.run(run())


def test_before_a_shutdown_requests_under_way_go_on_and_new_ones_are_refused(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        assert await first_of(gateway, router, events, event(0)) == event(0)
        rest = asyncio.ensure_future(_read_all(events, []))
        gateway._deployment.refuse_new_requests()
        with pytest.raises(UnavailableError) as caught:
            await anext(gateway.generate(request(30)))
        assert caught.value.retry_after_s == 1.0
        told = gateway.ready()
        assert (told.is_ready, told.is_deleted) == (False, True)
        # The one under way outlives its router, too.
        router.calls[0].reply.set_exception(RayActorError())
        await called(router, 2)
        whole = TokenEvent(0, (0, 1), finish_reason="length")
        router.calls[1].reply.set_result({"events": [whole.to_wire()]})
        await rest
        assert len(router.calls) == 2
        gateway._link.close()

    asyncio.run(run())


def test_a_deletion_ends_a_request_that_waits_for_another_router(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        assert await first_of(gateway, router, events, event(0)) == event(0)
        rest = asyncio.ensure_future(anext(events))
        router.calls[0].reply.set_exception(RayActorError())
        while gateway._inboxes:
            await asyncio.sleep(0)
        gateway._deployment.end_requests()
        with pytest.raises(UnavailableError, match="deleted"):
            await rest

    asyncio.run(run())


def test_what_the_routers_cannot_hold_is_refused_without_a_call(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()

        def ask(number: int) -> asyncio.Future[TokenEvent]:
            asked = replace(request(30), request_id=f"r{number}")
            return asyncio.ensure_future(anext(gateway.generate(asked)))

        held = [ask(number) for number in range(MAX_HELD)]
        await called(router, MAX_HELD)
        with pytest.raises(OverloadedError, match="hold 3 of at most 3 choices") as caught:
            await ask(MAX_HELD)
        assert caught.value.retry_after_s == 1.0
        assert len(router.calls) == MAX_HELD
        held[0].cancel()  # its client leaves
        router.calls[1].reply.set_result({"events": [event(0, "length").to_wire()]})
        await asyncio.wait(held[:2])
        held += [ask(number) for number in (7, 8)]
        await called(router, MAX_HELD + 2)
        with pytest.raises(OverloadedError):
            await ask(9)
        for one in held:
            one.cancel()
        await asyncio.wait(held)
        await asyncio.sleep(0)
        assert gateway._held["m"] == 0
        gateway._link.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_choices_are_counted_and_those_that_have_come_are_not(
    upstream: Callable[[], tuple[RayUpstream, Router]],
) -> None:
    async def run() -> None:
        gateway, router = upstream()

        def ask(number: int, n: int, num_finished: int = 0) -> asyncio.Future[TokenEvent]:
            asked = replace(
                request(30),
                request_id=f"r{number}",
                sampling=SamplingParams(1, n=n),
                received=tuple(Received((), i < num_finished) for i in range(n)),
            )
            return asyncio.ensure_future(anext(gateway.generate(asked)))

        held = [ask(0, 4, num_finished=2)]
        await called(router, 1)
        with pytest.raises(OverloadedError, match="hold 2 of at most 3 choices"):
            await ask(1, 2)
        held.append(ask(2, 1))
        await called(router, 2)
        for one in held:
            one.cancel()
        await asyncio.wait(held)
        await asyncio.sleep(0)
        held = [ask(3, 9)]  # alone it may have more
        await called(router, 3)
        with pytest.raises(OverloadedError, match="hold 9 of at most 3 choices"):
            await ask(4, 1)
        held[0].cancel()
        await asyncio.wait(held)
        await asyncio.sleep(0)
        assert gateway._held["m"] == 0
        gateway._link.close()

    asyncio.run(asyncio.wait_for(run(), 20))


REPLACED: dict[str, Any] = {
    "error": ModelReplacedError().to_wire(),
    "replaced": True,
    "has_other_text": False,
}


def test_a_request_without_tokens_goes_to_a_router_of_the_new_model(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))

    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(request(30))
        first = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(10):
            for number in range(2 * RESUMED_TIMES):
                while len(router.calls) <= number:
                    await asyncio.sleep(0.001)
                router.calls[number].reply.set_result(REPLACED)
            while len(router.calls) <= 2 * RESUMED_TIMES:
                await asyncio.sleep(0.001)
            whole = TokenEvent(0, (7,), finish_reason="length", identity="new")
            router.calls[-1].reply.set_result({"events": [whole.to_wire()]})
            assert await first == whole
        gateway._link.close()

    asyncio.run(run())


@pytest.mark.parametrize("resumed", [False, True], ids=["of a lost router", "of a client"])
def test_tokens_of_the_old_model_are_never_followed_by_the_new_ones(
    upstream: Callable[[], tuple[RayUpstream, Router]],
    monkeypatch: pytest.MonkeyPatch,
    resumed: bool,
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))

    async def run() -> None:
        gateway, router = upstream()
        asked = replace(request(30), sampling=SamplingParams(9))
        if resumed:
            asked = replace(asked, received=(Received((5,), identity="old"),))
        events = gateway.generate(asked)
        begun = replace(event(int(resumed)), identity="" if resumed else "old")
        await first_of(gateway, router, events, begun)
        router.calls[0].reply.set_result(REPLACED)
        ended = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(10):
            for number in range(1, RESUMED_TIMES + 1):
                while len(router.calls) <= number:
                    await asyncio.sleep(0.001)
                assert router.wires[number]["received"][0]["identity"] == "old"
                router.calls[number].reply.set_result(REPLACED)
            with pytest.raises(InvalidRequestError if resumed else ModelReplacedError) as caught:
                await ended
        assert caught.value.field == ("resume[0].identity" if resumed else "")
        assert caught.value.retry_after_s == (None if resumed else 1.0)
        gateway._link.close()

    asyncio.run(run())


def prompt_event(start: int, count: int) -> TokenEvent:
    rows = tuple(PromptLogprobs(-float(i), (), (), 1) for i in range(start, start + count))
    return TokenEvent(0, (), identity="one", prompt_logprobs=rows, prompt_start=start)


def asked_of_a_prompt() -> GenerationRequest:
    sampling = SamplingParams(max_tokens=9, prompt_logprobs=0)
    return replace(request(30), prompt_token_ids=tuple(range(6)), sampling=sampling)


def test_log_probabilities_of_a_prompt_that_have_come_are_not_asked_for_again(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))

    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(asked_of_a_prompt())
        await first_of(gateway, router, events, prompt_event(0, 2))
        router.calls[0].reply.set_exception(RayActorError())
        following = asyncio.ensure_future(anext(events))
        await called(router, 2)
        [received] = router.wires[1]["received"]
        assert (received["num_prompt_logprobs"], received["token_ids"]) == (2, ())
        rest = replace(prompt_event(2, 3), token_ids=(7,), finish_reason="length")
        gateway._on_tokens("r#1", prompt_event(3, 2))  # after a gap: the reply has it
        router.calls[1].reply.set_result({"events": [rest.to_wire()]})
        assert await following == rest
        gateway._link.close()

    asyncio.run(run())


def test_log_probabilities_of_the_old_model_are_never_followed_by_tokens_of_the_new(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.0, 2.0, 0.0))

    async def run() -> None:
        gateway, router = upstream()
        events = gateway.generate(asked_of_a_prompt())
        await first_of(gateway, router, events, prompt_event(0, 2))
        ended = asyncio.ensure_future(anext(events))
        for number in range(RESUMED_TIMES + 1):
            await called(router, number + 1)
            router.calls[number].reply.set_result(REPLACED)
        with pytest.raises(ModelReplacedError):
            await ended
        gateway._link.close()

    asyncio.run(run())


def test_a_router_with_the_gateways_tokenizer_is_looked_for_shortly(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.01, 1.0, 0.01))
    monkeypatch.setattr(ray_upstream, "OTHER_TEXT_S", 0.2)

    async def run() -> None:
        gateway, router = upstream()
        first = asyncio.ensure_future(anext(gateway.generate(request(30))))
        answered = 0
        async with asyncio.timeout(10):
            while not first.done():
                for call in router.calls[answered:]:
                    call.reply.set_result({**REPLACED, "has_other_text": True})
                answered = len(router.calls)
                await asyncio.sleep(0.001)
        assert answered > 1
        with pytest.raises(ModelReplacedError):
            await first
        gateway._link.close()

    asyncio.run(run())


def test_a_new_gateway_waits_for_its_routers_turn(
    upstream: Callable[[], tuple[RayUpstream, Router]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "TURN_CHECK_S", 0.001)
    old, new = ModelExperts("m@old", (0,), 2, 1), ModelExperts("m@new", (0,), 2, 1)

    async def run() -> None:
        gateway, _ = upstream()
        gateway._deployment._view.publish(empty_placement(1, [old]))
        turn = asyncio.ensure_future(gateway._deployment.take_turn(["m@new"]))
        await asyncio.sleep(0.05)
        assert not turn.done()
        both = empty_placement(2, [old, new])
        gateway._deployment._view.publish(both)
        await asyncio.sleep(0.05)
        assert not turn.done()
        gateway._deployment._view.publish(both.with_actor("a", 1, new.expert_keys()))
        await asyncio.wait_for(turn, 5)
        # A first start waits for no experts, and without a placement not for long.
        gateway._deployment._view.publish(empty_placement(3, [new]))
        await asyncio.wait_for(gateway._deployment.take_turn(["m@new"]), 5)
        monkeypatch.setattr(deployment_module, "TURN_S", 0.05)
        gateway._deployment._view.placement = None
        await asyncio.wait_for(gateway._deployment.take_turn(["m@new"]), 5)
        gateway._link.close()

    asyncio.run(run())
