"""The gateway's upstream: what must hold without a Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
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
from cluster.spec import ModelExperts
from router.gateway.output import inbox as inbox_module
from router.gateway.output.inbox import Inbox
from router.gateway.upstream import deployment as deployment_module
from router.gateway.upstream import ray_upstream
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
from tests.unit.router.gateway.upstream import router_fakes
from tests.unit.router.gateway.upstream.router_fakes import CrashedError, quiet_deployment

MAX_HELD = 3
DELETED = "deleted"
LOST = RayActorError()


def event(start: int, finish_reason: str | None = None) -> TokenEvent:
    return TokenEvent(0, (start,), start=start, finish_reason=finish_reason)


WHOLE = TokenEvent(0, (0, 1), finish_reason="length")


@pytest.mark.parametrize("turns", range(5))
async def test_a_cancellation_that_meets_a_token_is_not_swallowed(turns: int) -> None:
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


async def test_the_first_token_is_told_at_once_and_those_in_the_pause_together() -> None:
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


async def test_readers_that_begin_at_any_time_are_woken_at_the_same_one() -> None:
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
        assert await inbox.take(0.0) == ([event(1)], None)
        inbox.put(event(2))  # without a pause there is nothing to wait for
        assert await inbox.take(0.5) == ([event(2)], None)


async def test_an_end_does_not_wait_for_the_pause() -> None:
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


async def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_BUFFERED_EVENTS", 2)
    inbox = Inbox()
    for start in range(5):
        inbox.put(event(start))
    assert await inbox.take(0) == ([event(0), event(1)], None)


class Call(router_fakes.Call):
    @property
    def request(self) -> GenerationRequest:
        return GenerationRequest.from_wire(self.wire["request"])

    def answer(self, whole: TokenEvent = WHOLE) -> None:
        self.reply.set_result({"events": [whole.to_wire()]})


Router = router_fakes.Routers[Call]


@pytest.fixture
def router() -> Router:
    return Router(Call)


@pytest.fixture
def made(router: Router, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RayUpstream]:
    """Makes an upstream with one router and without a controller, in a running loop."""
    monkeypatch.setattr(ray_upstream.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray_upstream.ray, "get_runtime_context", lambda: context)
    nodes = [{"NodeID": "here", "Alive": True}, {"NodeID": "gone", "Alive": False}]
    monkeypatch.setattr(ray_upstream.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_upstream, "RESEND", RetryPolicy(0.01, 1.0, 0.01))
    routers: Any = {"m": router}
    return lambda: RayUpstream(quiet_deployment(routers, monkeypatch), routers, MAX_HELD)


@dataclass
class Up:
    """An upstream and its router."""

    gateway: RayUpstream
    router: Router


@pytest.fixture
def up(router: Router, made: Callable[[], RayUpstream], runner: asyncio.Runner) -> Iterator[Up]:
    async def make() -> RayUpstream:
        return made()

    async def close() -> None:
        upstream._link.close()

    upstream = runner.run(make())
    yield Up(upstream, router)
    runner.run(close())


def request(timeout_s: float = 30.0, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        model="m",
        prompt_token_ids=(1,),
        sampling=SamplingParams(**{"max_tokens": 1} | sampling),
        deadline_s=time.monotonic() + timeout_s,
    )


async def begun(
    up: Up,
    asked: GenerationRequest,
    early: TokenEvent = event(0),  # noqa: B008
) -> AsyncGenerator[TokenEvent, None]:
    """Ask, and let ``early`` come over the link; returns the events after it."""
    events = up.gateway.generate(asked)
    first = asyncio.ensure_future(anext(events))
    await up.router.called(1)
    up.gateway._on_tokens("r#0", early)
    assert await first == early
    return events


def reading(
    up: Up, asked: GenerationRequest, into: list[TokenEvent] | None = None
) -> asyncio.Future[None]:
    """Ask, and read to the end in the background."""

    async def read() -> None:
        async for one in up.gateway.generate(asked):
            if into is not None:
                into.append(one)

    return asyncio.ensure_future(read())


async def test_what_comes_while_the_reader_is_busy_comes_as_one(up: Up) -> None:
    events = await begun(up, request(max_tokens=999))
    for start in range(1, 500):
        up.gateway._on_tokens("r#0", event(start))
        await asyncio.sleep(0)
    assert await anext(events) == TokenEvent(0, tuple(range(1, 500)), start=1)
    up.gateway._on_tokens("r#0", event(500))
    assert await anext(events) == event(500)
    await events.aclose()


async def test_a_router_that_goes_silent_is_given_up_after_the_deadline(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.05)
    asked = request(0.1, max_tokens=9)
    events = await begun(up, asked)
    up.gateway._on_tokens("r#0", event(1))
    assert await anext(events) == event(1)
    assert asked.remaining_s() > 0
    with pytest.raises(DeadlineExceededError, match="before its last token"):
        await anext(events)
    assert asked.remaining_s() <= -0.04
    assert [call.was_cancelled for call in up.router.calls] == [True]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_that_reads_on_past_the_deadline_gets_what_came_before_it(
    up: Up, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.0)
    asked = request(0.1, max_tokens=2)
    events = await begun(up, asked)
    if fails:
        up.router.calls[0].reply.set_result(FULL)
    else:
        up.router.calls[0].answer()
    while asked.remaining_s() > -0.05:
        await asyncio.sleep(0.01)
    if fails:
        with pytest.raises(OverloadedError, match="full"):
            await anext(events)
    else:
        assert [one async for one in events] == [event(1, "length")]
        assert not up.router.calls[0].was_cancelled


async def test_a_request_that_ends_leaves_no_timer(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr(Inbox, "expire", lambda inbox, error: ended.append(error))
    monkeypatch.setattr(ray_upstream, "GRACE_S", 0.0)
    events = await begun(up, request(0.05), event(0, "length"))
    await events.aclose()
    await asyncio.sleep(0.1)
    assert ended == []


async def test_a_call_knows_the_span_of_its_request(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = SpanKeeper()
    monkeypatch.setattr(trace, "get_tracer", spans.provider.get_tracer)
    serves = spans.tracer.start_span("serve")
    with as_current(serves):
        events = await begun(up, request(), event(0, "length"))
        assert trace.get_current_span() is serves
        await events.aclose()
    [told] = spans.told()
    assert told.parent == serves.get_span_context()
    assert told.attributes["gen_ai.usage.output_tokens"] == 1
    assert [span.get_span_context() for span in up.router.spans] == [told.context]


async def test_routers_of_other_nodes_can_connect_once_there_is_one(
    up: Up,
    made: Callable[[], RayUpstream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def told(gateway: RayUpstream) -> LinkAddress:
        asked = await begun(Up(gateway, up.router), request(), event(0, "length"))
        await asked.aclose()
        return LinkAddress.from_wire(up.router.calls.pop().wire["address"])

    alone = await told(up.gateway)
    assert (alone.node, bool(alone.name), alone.port) == ("here", True, 0)
    up.router.on_node("here")
    assert await told(up.gateway) == alone
    up.router.on_node("there")
    both = await told(up.gateway)
    assert (both.name, both.host, both.port > 0) == (alone.name, "127.0.0.1", True)

    two = [{"NodeID": "here", "Alive": True}, {"NodeID": "there", "Alive": True}]
    monkeypatch.setattr(ray_upstream.ray, "nodes", lambda: two)
    knows = made()
    await knows._looking
    assert (await told(knows)).port
    knows._link.close()

    def fail() -> None:
        raise RaySystemError("Ray's head does not answer")

    monkeypatch.setattr(ray_upstream.ray, "nodes", fail)
    learns = made()
    await learns._looking
    assert (await told(learns)).port == 0
    up.router.on_node("there")
    assert (await told(learns)).port
    learns._link.close()


@pytest.mark.parametrize("reason", ["length", None])
async def test_a_call_is_cancelled_only_while_tokens_are_missing(
    up: Up, reason: str | None
) -> None:
    events = await begun(up, request(), event(0, reason))
    await events.aclose()
    assert up.router.calls[0].was_cancelled == (reason is None)
    if reason is not None:
        up.router.calls[0].reply.set_result({"events": []})
        await asyncio.sleep(0.01)
    assert not up.gateway._leaving


async def test_a_request_that_is_cancelled_at_once_takes_no_other_along(up: Up) -> None:
    gone = reading(up, request())
    await asyncio.sleep(0)  # lets it open the link's server, and call
    gone.cancel()
    await asyncio.wait({gone})
    assert up.router.calls.pop().was_cancelled
    await (await begun(up, request())).aclose()
    assert not up.gateway._inboxes
    assert up.gateway._num_streams == 0


@pytest.mark.parametrize("deaths", [1, 3])
async def test_a_request_whose_router_dies_goes_on_at_another_from_what_was_passed_on(
    up: Up, deaths: int
) -> None:
    got: list[TokenEvent] = []
    ended = reading(up, request(max_tokens=9, n=3), got)
    for death in range(deaths):
        call = await up.router.called(death + 1)
        if death > 0:
            received = [(one.token_ids, one.finished) for one in call.request.received]
            assert received == [((*range(death),), False), ((5,), True), ((), True)]
        up.gateway._on_tokens(f"r#{death}", TokenEvent(0, (death,), start=death))
        up.gateway._on_tokens(f"r#{death}", TokenEvent(1, (5,), finish_reason="stop"))
        up.gateway.stop("r", 2)  # the gateway found a stop string
        while len(got) < death + 2:
            await asyncio.sleep(0.001)
        call.fail(LOST)
    last = await up.router.called(deaths + 1)
    up.gateway._on_tokens("r#0", TokenEvent(0, (99,), start=deaths))  # too late: not wanted
    last.answer(TokenEvent(0, (deaths, 77), finish_reason="length", start=deaths))
    await ended
    assert merge_events(got) == [
        TokenEvent(0, (*range(deaths + 1), 77), finish_reason="length"),
        TokenEvent(1, (5,), finish_reason="stop"),
    ]


class StoppedError(ActorDiedError):
    """Ray's error of a replica that Serve has ended."""

    def __str__(self) -> str:
        return "The actor is dead because it was killed by `ray.kill`."


@dataclass
class Resends:
    """One request, of which each router dies."""

    up: Up
    number: int = 0

    async def dies(self, error: BaseException, *alone: bool) -> GenerationRequest:
        """Let the request's router die; returns what it was asked."""
        call = await self.up.router.called(self.number + 1)
        for is_alone in alone:
            self.up.gateway._on_alone(f"r#{self.number}", is_alone)
        call.fail(error)
        self.number += 1
        return call.request


@pytest.mark.parametrize(
    "errors",
    [
        (CrashedError(), OutOfMemoryError("no memory")),
        (LinkBrokenError("it is cut"), CrashedError()),  # this also counts as a death
    ],
    ids=["crash", "broken link"],
)
async def test_a_request_that_ends_its_routers_is_tried_alone_and_then_fails(
    up: Up, errors: tuple[Exception, ...]
) -> None:
    ended = reading(up, replace(request(), streamed=False))
    resends = Resends(up)
    sent = [await resends.dies(error) for error in errors]
    sent.append(await resends.dies(CrashedError(), True, False, True))
    with pytest.raises(PoisonedRequestError, match="died while computing only this request"):
        await ended
    assert [s.alone for s in sent] == [False, False, True]
    assert [s.streamed for s in sent] == [False, True, True]
    assert up.router.counted == [
        "links",
        "serve",
        "serve",
    ]  # it tells a dead router


async def test_a_request_that_saw_others_end_its_routers_is_not_failed(up: Up) -> None:
    """Routers die while it waits for its turn, or after it; Serve stops one; it makes progress."""
    got: list[TokenEvent] = []
    ended = reading(up, request(), got)
    resends = Resends(up)
    errors = (CrashedError(), StoppedError(), LOST, NodeDiedError("the node died"))
    sent = [await resends.dies(error) for error in (*errors, CrashedError(), CrashedError())]
    sent.append(await resends.dies(CrashedError(), True, False))
    sent.append(await resends.dies(StoppedError(), True))
    await up.router.called(resends.number + 1)
    up.gateway._on_tokens(f"r#{resends.number}", event(0))
    while not got:
        await asyncio.sleep(0.001)
    sent.append(await resends.dies(CrashedError(), True, False))
    (await up.router.called(resends.number + 1)).answer()
    await ended
    assert merge_events(got) == [WHOLE]
    assert [s.alone for s in sent] == [False] * 5 + [True] * 4
    assert not up.router.calls[-1].request.alone  # a token came since


async def test_a_request_that_ends_its_routers_before_they_compute_it_fails_in_the_end(
    up: Up,
) -> None:
    ended = reading(up, request())
    resends = Resends(up)
    for _ in range(6):
        await resends.dies(CrashedError())
    with pytest.raises(PoisonedRequestError, match="6 routers in a row died"):
        await ended
    assert len(up.router.calls) == 6


FULL: dict[str, Any] = {"error": OverloadedError("full", "queue", 0.01).to_wire()}


async def test_a_full_queue_refuses_a_new_request_but_not_one_that_was_accepted(up: Up) -> None:
    refused = reading(up, request())
    (await up.router.called(1)).reply.set_result(FULL)
    with pytest.raises(OverloadedError):
        await refused
    got: list[TokenEvent] = []
    accepted = reading(up, request(), got)
    (await up.router.called(2)).fail(LOST)
    (await up.router.called(3)).reply.set_result(FULL)
    (await up.router.called(4)).answer()
    await accepted
    assert got == [WHOLE]


async def test_a_full_router_s_request_goes_to_each_other_once(up: Up) -> None:
    up.router.addresses = [LinkAddress(name, "secret", b"name") for name in "abc"]
    got: list[TokenEvent] = []
    served = reading(up, request(), got)
    for number in (1, 2):
        (await up.router.called(number)).reply.set_result(FULL)
    (await up.router.called(3)).answer()
    await served
    assert got == [WHOLE]

    refused = reading(up, request())
    for number in (4, 5, 6):
        (await up.router.called(number)).reply.set_result(FULL)
    with pytest.raises(OverloadedError):
        await refused

    too_large = reading(up, request())
    error = OverloadedError("needs more than a router has").to_wire()
    (await up.router.called(7)).reply.set_result({"error": error})
    with pytest.raises(OverloadedError, match="more than a router has"):
        await too_large
    assert len(up.router.calls) == 7


async def test_what_a_full_router_refused_through_serve_goes_to_links_that_came_since(
    up: Up,
) -> None:
    got: list[TokenEvent] = []
    served = reading(up, request(), got)
    first = await up.router.called(1)
    up.router.addresses = [LinkAddress(name, "secret", b"name") for name in "ab"]
    first.reply.set_result(FULL)
    (await up.router.called(2)).reply.set_result(FULL)
    (await up.router.called(3)).answer()
    await served
    assert got == [WHOLE]


async def test_a_request_is_refused_when_serve_chooses_full_routers_twice(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up.router, "has_other", lambda asked: True)
    refused = reading(up, request())
    for number in (1, 2):
        (await up.router.called(number)).reply.set_result(FULL)
    with pytest.raises(OverloadedError):
        await refused
    assert len(up.router.calls) == 2


@pytest.mark.parametrize(
    ("timeout_s", "budget"), [(-0.1, RetryBudget()), (30.0, RetryBudget(max_tokens=1))]
)
async def test_no_request_is_sent_again_past_its_deadline_or_the_budget(
    up: Up, timeout_s: float, budget: RetryBudget
) -> None:
    up.gateway._budget = budget
    ended = reading(up, request(timeout_s))
    (await up.router.called(1)).fail(LOST)
    with pytest.raises(UnavailableError) as caught:
        await ended
    assert caught.value.retry_after_s == 1.0
    assert len(up.router.calls) == 1


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


async def test_a_deletion_ends_all_requests_and_takes_no_more(up: Up) -> None:
    events = await begun(up, request())
    up.gateway._deployment.end_requests()
    with pytest.raises(UnavailableError, match=DELETED):
        await anext(events)
    assert up.router.calls[0].was_cancelled
    with pytest.raises(UnavailableError, match=DELETED):
        await reading(up, request())
    assert len(up.router.calls) == 1
    told = up.gateway.ready()
    assert (told.is_ready, told.is_deleted) == (False, True)


async def test_a_deletion_ends_a_request_that_waits_for_another_router(up: Up) -> None:
    events = await begun(up, request())
    rest = asyncio.ensure_future(anext(events))
    up.router.calls[0].fail(LOST)
    while up.gateway._inboxes:
        await asyncio.sleep(0)
    up.gateway._deployment.end_requests()
    with pytest.raises(UnavailableError, match=DELETED):
        await rest


async def test_before_a_shutdown_requests_under_way_go_on_and_new_ones_are_refused(up: Up) -> None:
    ended = reading(up, request())
    await up.router.called(1)
    up.gateway._deployment.refuse_new_requests()
    with pytest.raises(UnavailableError) as caught:
        await reading(up, request())
    assert caught.value.retry_after_s == 1.0
    told = up.gateway.ready()
    assert (told.is_ready, told.is_deleted) == (False, True)
    up.router.calls[0].fail(LOST)  # the one under way outlives its router, too
    (await up.router.called(2)).answer()
    await ended
    assert len(up.router.calls) == 2


async def test_what_the_routers_cannot_hold_is_refused_without_a_call(up: Up) -> None:
    def ask(number: int, n: int = 1, num_finished: int = 0) -> asyncio.Future[None]:
        received = tuple(Received((), i < num_finished) for i in range(n))
        return reading(up, replace(request(n=n), request_id=f"r{number}", received=received))

    async def leave(*held: asyncio.Future[None]) -> None:
        for one in held:
            one.cancel()
        await asyncio.wait(held)
        await asyncio.sleep(0)
        assert up.gateway._held["m"] == 0

    held = [ask(number) for number in range(MAX_HELD)]
    await up.router.called(MAX_HELD)
    with pytest.raises(OverloadedError, match="hold 3 of at most 3 choices") as caught:
        await ask(MAX_HELD)
    assert caught.value.retry_after_s == 1.0
    assert len(up.router.calls) == MAX_HELD
    held[0].cancel()  # its client leaves
    up.router.calls[1].answer()
    await asyncio.wait(held[:2])
    held += [ask(number) for number in (7, 8)]
    await up.router.called(MAX_HELD + 2)
    with pytest.raises(OverloadedError):
        await ask(9)
    await leave(*held)

    up.router.calls.clear()
    held = [ask(10, 4, num_finished=2)]  # those that have come are not counted
    await up.router.called(1)
    with pytest.raises(OverloadedError, match="hold 2 of at most 3 choices"):
        await ask(11, 2)
    held.append(ask(12, 1))
    await up.router.called(2)
    await leave(*held)
    alone = ask(13, 9)  # alone it may have more
    await up.router.called(3)
    with pytest.raises(OverloadedError, match="hold 9 of at most 3 choices"):
        await ask(14)
    await leave(alone)


REPLACED: dict[str, Any] = {
    "error": ModelReplacedError().to_wire(),
    "replaced": True,
    "has_other_text": False,
}


async def test_a_request_without_tokens_goes_to_a_router_of_the_new_model(up: Up) -> None:
    got: list[TokenEvent] = []
    ended = reading(up, request(), got)
    for number in range(2 * RESUMED_TIMES):
        (await up.router.called(number + 1)).reply.set_result(REPLACED)
    whole = replace(WHOLE, identity="new")
    (await up.router.called(2 * RESUMED_TIMES + 1)).answer(whole)
    await ended
    assert got == [whole]


def prompt_event(start: int, count: int) -> TokenEvent:
    rows = tuple(PromptLogprobs(-float(i), (), (), 1) for i in range(start, start + count))
    return TokenEvent(0, (), identity="old", prompt_logprobs=rows, prompt_start=start)


def asked_of_a_prompt() -> GenerationRequest:
    return replace(request(max_tokens=9, prompt_logprobs=0), prompt_token_ids=tuple(range(6)))


@pytest.mark.parametrize("of", ["a lost router", "a client", "a prompt"])
async def test_what_came_of_the_old_model_is_never_followed_by_the_new_ones(
    up: Up, of: str
) -> None:
    asked, early = request(max_tokens=9), replace(event(0), identity="old")
    if of == "a client":
        asked, early = replace(asked, received=(Received((5,), identity="old"),)), event(1)
    elif of == "a prompt":
        asked, early = asked_of_a_prompt(), prompt_event(0, 2)
    ended = asyncio.ensure_future(anext(await begun(up, asked, early)))
    for number in range(RESUMED_TIMES + 1):
        call = await up.router.called(number + 1)
        assert number == 0 or call.request.received[0].identity == "old"
        call.reply.set_result(REPLACED)
    is_clients = of == "a client"
    with pytest.raises(InvalidRequestError if is_clients else ModelReplacedError) as caught:
        await ended
    assert caught.value.field == ("resume[0].identity" if is_clients else "")
    assert caught.value.retry_after_s == (None if is_clients else 1.0)


async def test_log_probabilities_of_a_prompt_that_have_come_are_not_asked_for_again(up: Up) -> None:
    events = await begun(up, asked_of_a_prompt(), prompt_event(0, 2))
    up.router.calls[0].fail(LOST)
    following = asyncio.ensure_future(anext(events))
    second = await up.router.called(2)
    [received] = second.request.received
    assert (received.num_prompt_logprobs, received.token_ids) == (2, ())
    rest = replace(prompt_event(2, 3), token_ids=(7,), finish_reason="length")
    up.gateway._on_tokens("r#1", prompt_event(3, 2))  # after a gap: the reply has it
    second.answer(rest)
    assert await following == rest


async def test_a_router_with_the_gateways_tokenizer_is_looked_for_shortly(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_upstream, "OTHER_TEXT_S", 0.2)
    ended = reading(up, request())
    answered = 0
    while not ended.done():
        for call in up.router.calls[answered:]:
            call.reply.set_result({**REPLACED, "has_other_text": True})
        answered = len(up.router.calls)
        await asyncio.sleep(0.001)
    assert answered > 1
    with pytest.raises(ModelReplacedError):
        await ended


async def test_a_new_gateway_waits_for_its_routers_turn(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "TURN_CHECK_S", 0.001)
    old, new = ModelExperts("m@old", (0,), 2, 1), ModelExperts("m@new", (0,), 2, 1)
    deployment = up.gateway._deployment
    both = empty_placement(2, [old, new])
    deployment._view.publish(empty_placement(1, [old]))
    turn = asyncio.ensure_future(deployment.take_turn(["m@new"]))
    await asyncio.sleep(0.05)
    assert not turn.done()
    deployment._view.publish(both)
    await asyncio.sleep(0.05)
    assert not turn.done()
    deployment._view.publish(both.with_actor("a", 1, new.expert_keys()))
    await turn
    # A first start waits for no experts, and without a placement not for long.
    deployment._view.publish(empty_placement(3, [new]))
    await deployment.take_turn(["m@new"])
    monkeypatch.setattr(deployment_module, "TURN_S", 0.05)
    deployment._view.placement = None
    await deployment.take_turn(["m@new"])
