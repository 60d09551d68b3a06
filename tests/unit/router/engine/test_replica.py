"""The router replica's delivery of a step, without an engine: what travels early to whom."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from cluster.errors import CancelledRequestError, UnavailableError
from router.engine.emission import Emission
from router.engine.replica import RouterReplica, _Request
from router.messages.link import LinkAddress
from router.messages.request import GenerationRequest, Received, SamplingParams, TokenEvent
from router.messages.routed import RoutedExperts
from tests.unit.router.control.test_placement_view import on_loop

HERE, THERE = LinkAddress("n", "", b"a"), LinkAddress("n", "", b"b")


class Links:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.frames: list[tuple[LinkAddress, list[tuple[str, TokenEvent]]]] = []
        self.told: list[tuple[LinkAddress, str, bool, int]] = []

    def connect(self, address: LinkAddress) -> None: ...

    def send(self, address: LinkAddress, events: list[tuple[str, TokenEvent]]) -> None:
        self.frames.append((address, events))

    async def send_alone(self, address: LinkAddress, request_id: str, is_alone: bool) -> bool:
        self.told.append((address, request_id, is_alone, len(self.frames)))
        return True


class Engine:
    """Takes requests; the test emits for them."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.stopped: list[tuple[str, int]] = []
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest, trace: None) -> None:
        self.submitted.append(request.request_id)

    def stop_choice(self, request_id: str, index: int) -> None:
        self.stopped.append((request_id, index))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def replica(**streamed: tuple[LinkAddress, bool]) -> Any:
    """A replica that has only its requests, by id: for which gateway, and whether streamed."""
    made: Any = object.__new__(RouterReplica)
    made._links, made._engine = Links(), Engine()
    made._node, made._is_deleted = "n", False
    made._loop, made._call_numbers = asyncio.get_running_loop(), itertools.count()
    made._model = SimpleNamespace(
        identity="own", text_identity="text", num_layers=3, num_experts_per_tok=2, num_experts=8
    )
    made._requests = {
        request_id: _Request(request_id, address, flag, made._loop.create_future(), 1)
        for request_id, (address, flag) in streamed.items()
    }
    return made


def wire_of(request: GenerationRequest) -> Any:
    """The call of a request, as it comes over a link."""
    return msgpack.unpackb(msgpack.packb({"request": request.to_wire(), "address": HERE.to_wire()}))


def step(start: int, *request_ids: str, finish_reason: str | None = None) -> list[Emission]:
    event = TokenEvent(0, (start,), finish_reason=finish_reason, start=start)
    return [Emission(request_id, event) for request_id in request_ids]


@on_loop
async def test_a_step_is_one_frame_per_gateway_and_of_unary_requests_only_the_first() -> None:
    made = replica(a=(HERE, True), b=(HERE, False), c=(THERE, False))
    made._deliver(step(0, "a", "b", "c"))
    made._deliver(step(1, "a", "b", "c"))
    made._deliver(step(2, "b", "c", finish_reason="length"))
    told = [(address, [request_id for request_id, _ in e]) for address, e in made._links.frames]
    assert told == [(HERE, ["a", "b"]), (THERE, ["c"]), (HERE, ["a"])]
    assert not made._requests["a"].done.done()
    assert made._requests["b"].done.done()
    assert [e.token_ids for e in made._requests["c"].events] == [(0,), (1,), (2,)]


@on_loop
async def test_a_call_that_comes_twice_doubles_no_token() -> None:
    made = replica()
    asked = GenerationRequest("r#0", "m", (1,), SamplingParams(max_tokens=2), 0.0)
    calls = [asyncio.ensure_future(made.generate(wire_of(asked))) for _ in range(2)]
    while len(made._engine.submitted) < 2:
        await asyncio.sleep(0)
    first, second = made._engine.submitted
    made._stop_choice("r#0", 0)
    assert made._engine.stopped == [(first, 0), (second, 0)]
    made._deliver(step(0, first, second))
    made._deliver(step(1, first, second, finish_reason="length"))
    whole = TokenEvent(0, (0, 1), finish_reason="length").to_wire()
    assert [await call for call in calls] == [{"events": [whole]}] * 2
    told = [(name, event.start) for _, frame in made._links.frames for name, event in frame]
    assert told == [("r#0", 0)] * 2 + [("r#0", 1)] * 2
    assert made._requests == {}


@on_loop
async def test_a_gateway_has_the_tokens_of_a_step_alone_before_the_word_that_it_has_ended() -> None:
    made = replica(a=(HERE, True))

    def on_the_engines_thread() -> list[bool]:
        begun = made._announce("a", True)
        made._emit(step(0, "a"))
        return [begun, made._announce("a", False), made._announce("gone", True)]

    assert await asyncio.to_thread(on_the_engines_thread) == [True, True, False]
    assert made._links.told == [(HERE, "a", True, 0), (HERE, "a", False, 1)]


@on_loop
async def test_an_error_ends_its_request_and_no_frame_is_sent() -> None:
    made = replica(a=(HERE, True))
    made._deliver([Emission("a", CancelledRequestError("x")), *step(0, "a", "gone")])
    assert isinstance(made._requests["a"].done.exception(), CancelledRequestError)
    assert made._links.frames == []


@on_loop
async def test_a_deletion_ends_all_requests_and_takes_no_more() -> None:
    made = replica(a=(HERE, True), b=(THERE, False))
    made._requests["b"].done.set_result(None)
    made._end_requests()
    assert made._engine.cancelled == ["a", "b"]
    assert isinstance(made._requests["a"].done.exception(), UnavailableError)
    assert made._requests["b"].done.exception() is None
    reply = await made.generate({})
    assert reply["error"]["code"] == "unavailable"


@on_loop
async def test_a_replica_that_ends_waits_for_its_requests() -> None:
    made = replica(a=(HERE, True), b=(THERE, False))
    finishing = asyncio.ensure_future(made.finish())
    for request_id in ("a", "b"):
        assert not (await asyncio.wait([finishing], timeout=0.2))[0]
        del made._requests[request_id]
    async with asyncio.timeout(5):
        await finishing


@pytest.mark.parametrize(
    ("received", "text_identity", "serves", "routed"),
    [
        ((), "text", True, RoutedExperts((3, 2), 8)),
        ((), "text", False, RoutedExperts((4, 2), 8)),
        ((), "text", False, RoutedExperts((3, 1), 8)),
        ((), "text", False, RoutedExperts((3, 2), 9)),
        ((), "", True, None),
        ((), "text", True, None),
        ((), "other", False, None),
        ((Received((), identity="other"),), "text", True, None),
        ((Received((5,), identity="own"), Received()), "text", True, None),
        ((Received((5,), identity="other"),), "text", False, None),
        ((Received((5,), identity="own"), Received((5,), identity="other")), "text", False, None),
        ((Received((5,)),), "text", False, None),
    ],
)
@on_loop
async def test_a_request_of_another_model_is_refused_and_nothing_is_started(
    received: tuple[Received, ...], text_identity: str, serves: bool, routed: RoutedExperts | None
) -> None:
    made = replica()
    sampling = SamplingParams(max_tokens=2, n=max(1, len(received)))
    asked = GenerationRequest(
        "r#0", "m", (1,), sampling, 0.0, received=received, text_identity=text_identity,
        routed=routed,
    )  # fmt: skip
    call = asyncio.ensure_future(made.generate(wire_of(asked)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert call.done() == (not serves)
    assert len(made._engine.submitted) == serves
    if not serves:
        reply = await call
        assert reply["replaced"]
        assert reply["error"]["retry_after_s"] == 1.0
        assert made._requests == {}
    call.cancel()
    await asyncio.wait([call])
