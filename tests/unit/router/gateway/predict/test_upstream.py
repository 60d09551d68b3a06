"""Predictions over routers' handles: pieces, lost routers, redeploys, full queues, ends."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InternalError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from router.gateway.predict import upstream as upstream_module
from router.gateway.predict.upstream import (
    MAX_PIECE_BYTES,
    MAX_PIECE_ROWS,
    MAX_PIECES_AT_ONCE,
    REPEATED_TIMES,
    Predictions,
    joined,
    pieces_of,
)
from router.messages.call_link import LinkBrokenError
from router.messages.prediction import PredictionReply, PredictionRequest
from router.observability.tracing import as_current, continue_trace
from router.retry import RetryBudget, RetryPolicy
from tests.span_keeper import SpanKeeper
from tests.unit.router.gateway.upstream import router_fakes
from tests.unit.router.gateway.upstream.router_fakes import CrashedError, quiet_deployment

MAX_CALLS = 8


class Call(router_fakes.Call):
    """A call whose reply is each row's first value, negated."""

    @functools.cached_property
    def request(self) -> PredictionRequest:
        return PredictionRequest.from_wire(self.wire)

    def answer(self, identity: str = "now", exact: bool = True) -> None:
        [rows] = self.request.inputs.values()
        outputs = {"y": -rows.reshape(len(rows), -1)[:, :1]}
        reply = PredictionReply(outputs, exact, identity)
        self.reply.set_result({"reply": reply.to_wire()})

    def refuse(
        self, error: ExpertMeshError, replaced: bool = False, has_other_interface: bool = False
    ) -> None:
        wire = {"error": error.to_wire(), "replaced": replaced}
        self.reply.set_result(wire | {"has_other_interface": has_other_interface})


Routers = router_fakes.Routers[Call]


def lost(routers: Routers) -> Exception:
    """The error of a call whose router is lost."""
    return RayActorError() if routers.way == "serve" else LinkBrokenError()


@dataclass
class Up:
    """An upstream of one model, and its routers."""

    predictions: Predictions
    routers: Routers


@pytest.fixture(params=["serve", "links"])
def up(
    request: pytest.FixtureRequest, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Up]:
    """Without a controller and delays; calls go by Serve, since there is no link, or over links."""
    monkeypatch.setattr(upstream_module, "RESEND", RetryPolicy(0.0, 2.0, 0.0))
    monkeypatch.setattr(upstream_module, "RETRY_AFTER_S", 0.0)

    async def make() -> Up:
        routers = Routers(Call, request.param)
        handles: Any = {"m": routers}
        deployment = quiet_deployment(handles, monkeypatch)
        return Up(Predictions(deployment, handles, MAX_CALLS), routers)

    made = runner.run(make())
    yield made
    assert not made.predictions._answers
    assert made.predictions._calls["m"] == 0


def request(num_rows: int = 3, width: int = 2, timeout_s: float = 30.0) -> PredictionRequest:
    rows = np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width)
    return PredictionRequest("r", "m", {"x": rows}, ("y",), time.monotonic() + timeout_s, "drop")


PIECES = 6
LARGE_ROWS = PIECES * MAX_PIECE_ROWS - 7
"""Enough for more pieces than may be under way at one time."""


def asked(up: Up, given: PredictionRequest) -> asyncio.Task[PredictionReply]:
    return asyncio.create_task(up.predictions.predict(given))


def check_rows(reply: PredictionReply, given: PredictionRequest) -> None:
    np.testing.assert_array_equal(reply.outputs["y"], -given.inputs["x"][:, :1])


async def test_a_small_request_is_one_call(up: Up) -> None:
    given = request()
    work = asked(up, given)
    [call] = await up.routers.until(1)
    assert call.request.request_id == "r"
    assert call.request.outputs == ("y",)
    assert call.request.on_expert_loss == "drop"
    assert 10 < call.request.remaining_s() < 30
    np.testing.assert_array_equal(call.request.inputs["x"], given.inputs["x"])
    call.answer(exact=False)
    reply = await work
    check_rows(reply, given)
    assert (reply.exact, reply.identity) == (False, "now")
    assert up.routers.counted == [up.routers.way]
    assert not call.was_cancelled


async def test_calls_know_the_span_of_their_request(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = SpanKeeper()
    monkeypatch.setattr(trace, "get_tracer", spans.provider.get_tracer)
    serves = spans.tracer.start_span("serve")
    with as_current(serves):
        work = asked(up, request(2 * MAX_PIECE_ROWS))
    for call in await up.routers.until(2):
        call.answer()
    await work
    continue_trace({"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"})
    failing = asked(up, request())  # is not sampled
    (await up.routers.until(3))[2].refuse(InternalError("failed"))
    await asyncio.gather(failing, return_exceptions=True)
    [told] = spans.told()
    assert told.name == "expertmesh.prediction"
    assert told.parent == serves.get_span_context()
    assert told.attributes["expertmesh.rows"] == 2 * MAX_PIECE_ROWS
    assert told.attributes["expertmesh.exact"] is True
    contexts = [span.get_span_context() for span in up.routers.spans]
    assert contexts[:2] == [told.context] * 2
    assert contexts[2] != told.context


async def test_a_large_request_goes_in_pieces_and_comes_back_in_order(up: Up) -> None:
    given = request(LARGE_ROWS)
    work = asked(up, given)
    calls = await up.routers.until(MAX_PIECES_AT_ONCE)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(calls) == MAX_PIECES_AT_ONCE
    for number in (2, 0, 3, 1):  # answers come in any order
        calls[number].answer()
    await up.routers.until(PIECES)
    calls[5].answer(exact=False)
    calls[4].answer()
    reply = await work
    check_rows(reply, given)
    assert reply.exact is False
    assert len(calls) == PIECES
    assert len({call.request.request_id for call in calls}) == PIECES


@pytest.mark.parametrize(
    ("num_rows", "width", "count"),
    [
        (1, 2, 1),
        (MAX_PIECE_ROWS, 2, 1),
        (MAX_PIECE_ROWS + 1, 2, 2),
        (1024, MAX_PIECE_BYTES // 4096, 1),
        (1025, MAX_PIECE_BYTES // 4096, 2),
        (3, MAX_PIECE_BYTES, 3),  # one row alone is four times the bound
    ],
)
def test_pieces_are_of_nearly_equal_size_within_the_bounds(
    num_rows: int, width: int, count: int
) -> None:
    given = request(num_rows, width)
    pieces = pieces_of(given)
    sizes = [piece.num_rows for piece in pieces]
    assert (len(sizes), sum(sizes)) == (count, num_rows)
    assert max(sizes) - min(sizes) <= 1
    rows = np.concatenate([piece.inputs["x"] for piece in pieces])
    np.testing.assert_array_equal(rows, given.inputs["x"])


def test_replies_of_texts_of_other_lengths_are_joined() -> None:
    parts = [np.array([["a"]]), np.array([["longer"]])]
    whole = joined([PredictionReply({"y": part}, True, "now") for part in parts])
    assert whole.outputs["y"].tolist() == [["a"], ["longer"]]


async def test_a_piece_whose_router_dies_is_sent_again_and_no_other(up: Up) -> None:
    given = request(2 * MAX_PIECE_ROWS)
    work = asked(up, given)
    first, second = await up.routers.until(2)
    second.answer()
    for number in range(3):
        up.routers.calls[0 if number == 0 else -1].fail(lost(up.routers))
        await up.routers.until(3 + number)
    again = up.routers.calls[-1]
    assert again.request.request_id == first.request.request_id
    np.testing.assert_array_equal(again.request.inputs["x"], first.request.inputs["x"])
    again.answer()
    check_rows(await work, given)
    assert len(up.routers.calls) == 5


@pytest.mark.parametrize(
    ("timeout_s", "budget"), [(-0.001, RetryBudget()), (30.0, RetryBudget(max_tokens=1.0))]
)
async def test_nothing_is_sent_again_past_its_deadline_or_the_budget(
    up: Up, timeout_s: float, budget: RetryBudget
) -> None:
    up.predictions._budget = budget
    work = asked(up, request(timeout_s=timeout_s))
    [call] = await up.routers.until(1)
    call.fail(lost(up.routers))
    with pytest.raises(UnavailableError, match="the router is not reachable") as caught:
        await work
    assert caught.value.retry_after_s == 1.0
    assert len(up.routers.calls) == 1


async def test_a_replaced_model_is_asked_for_again_for_a_while(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = asked(up, request())
    for number in range(6):  # some have other inputs
        calls = await up.routers.until(number + 1)
        calls[-1].refuse(ModelReplacedError(), True, number % 2 == 1)
    (await up.routers.until(7))[-1].answer("new")
    assert (await work).identity == "new"
    monkeypatch.setattr(upstream_module, "OTHER_INTERFACE_S", 0.0)
    work = asked(up, request(timeout_s=1e6))
    (await up.routers.until(8))[-1].refuse(ModelReplacedError(), True, True)
    with pytest.raises(ModelReplacedError) as caught:
        await work
    assert caught.value.retry_after_s is not None


async def test_no_reply_is_of_two_models(up: Up) -> None:
    given = request(2 * MAX_PIECE_ROWS)
    work = asked(up, given)
    first, second = await up.routers.until(2)
    first.answer("old")
    second.refuse(ModelReplacedError(), replaced=True)
    (await up.routers.until(3))[2].answer("new")
    for call in (await up.routers.until(5))[3:]:  # both pieces anew
        call.answer("new")
    reply = await work
    assert reply.identity == "new"
    check_rows(reply, given)


async def test_a_request_that_redeploys_divide_for_ever_is_given_up(up: Up) -> None:
    work = asked(up, request(2 * MAX_PIECE_ROWS))
    for number in range(1 + REPEATED_TIMES):
        calls = await up.routers.until(2 * number + 2)
        calls[-2].answer("one")
        calls[-1].answer("other")
    with pytest.raises(ModelReplacedError):
        await work
    assert len(up.routers.calls) == 2 * (1 + REPEATED_TIMES)


FULL = OverloadedError("the queue is full", "queue", 0.0)


async def test_full_routers_refuse_a_new_request(up: Up) -> None:
    for refuse in (lambda c: c.refuse(FULL), lambda c: c.fail(BackPressureError(1, 1, 0))):
        work = asked(up, request())
        calls = await up.routers.until(len(up.routers.calls) + 1)
        refuse(calls[-1])
        with pytest.raises(OverloadedError):
            await work
    assert len(up.routers.calls) == 2
    work = asked(up, request(LARGE_ROWS))
    while not work.done():  # all of its pieces
        for call in up.routers.calls[2:]:
            if not call.reply.done():
                call.refuse(FULL)
        await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await work


async def test_a_piece_waits_for_room_while_the_routers_have_another(up: Up) -> None:
    given = request(2 * MAX_PIECE_ROWS)
    work = asked(up, given)
    first, second = await up.routers.until(2)
    second.refuse(FULL)
    (await up.routers.until(3))[2].refuse(FULL)
    calls = await up.routers.until(4)
    first.answer()
    await asyncio.sleep(0.01)
    calls[3].refuse(FULL)  # although none of it is under way, one was answered
    (await up.routers.until(5))[4].answer()
    check_rows(await work, given)


async def test_a_request_of_a_lost_router_waits_for_room(up: Up) -> None:
    work = asked(up, request())
    (await up.routers.until(1))[0].fail(lost(up.routers))
    (await up.routers.until(2))[1].refuse(FULL)
    (await up.routers.until(3))[2].answer()
    check_rows(await work, request())


async def test_what_the_routers_cannot_hold_is_refused_without_a_call(up: Up) -> None:
    held = [asked(up, request()) for _ in range(MAX_CALLS)]
    calls = await up.routers.until(MAX_CALLS)
    with pytest.raises(OverloadedError, match="hold 8 requests"):
        await up.predictions.predict(request())
    assert len(calls) == MAX_CALLS
    calls[0].answer()
    await held[0]
    held.append(asked(up, request()))
    for call in (await up.routers.until(MAX_CALLS + 1))[1:]:
        call.answer()
    await asyncio.gather(*held)


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceededError("too late"),
        InvalidRequestError("is wrong", "inputs.x"),
        UnavailableError("an expert has no copy"),
    ],
)
async def test_an_error_of_a_router_is_the_clients_and_ends_the_other_pieces(
    up: Up, error: ExpertMeshError
) -> None:
    work = asked(up, request(LARGE_ROWS))
    calls = await up.routers.until(MAX_PIECES_AT_ONCE)
    calls[1].refuse(error)
    with pytest.raises(type(error)) as caught:
        await work
    assert caught.value.to_wire() == error.to_wire()
    assert [call.was_cancelled for call in calls] == [True, False, True, True]


@pytest.mark.parametrize("failure", ["raises", "other rows", "no output"])
async def test_a_failure_of_a_router_is_internal_without_its_details(up: Up, failure: str) -> None:
    work = asked(up, request())
    [call] = await up.routers.until(1)
    if failure == "raises":
        call.fail(RuntimeError("secret"))
    else:
        outputs = {} if failure == "no output" else {"y": np.zeros((2, 1))}
        call.reply.set_result({"reply": PredictionReply(outputs, True, "now").to_wire()})
    with pytest.raises(InternalError, match=r"^the router failed$"):
        await work


@pytest.mark.parametrize(("num_rows", "count"), [(3, 1), (LARGE_ROWS, MAX_PIECES_AT_ONCE)])
async def test_a_client_that_leaves_and_a_deletion_end_all_calls(
    up: Up, num_rows: int, count: int
) -> None:
    work = asked(up, request(num_rows))
    await up.routers.until(count)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [call.was_cancelled for call in up.routers.calls] == [True] * count
    work = asked(up, request(num_rows))
    await up.routers.until(2 * count)
    up.predictions._deployment.end_requests()
    with pytest.raises(UnavailableError, match="being deleted") as caught:
        await work
    assert caught.value.retry_after_s == 1.0
    assert [call.was_cancelled for call in up.routers.calls] == [True] * 2 * count
    assert up.predictions.ready().is_deleted
    assert up.predictions.model_ready("m").is_deleted
    with pytest.raises(UnavailableError, match="being deleted"):
        await up.predictions.predict(request())


async def test_before_a_shutdown_requests_under_way_go_on_and_new_ones_are_refused(up: Up) -> None:
    work = asked(up, request())
    [call] = await up.routers.until(1)
    up.predictions._deployment.refuse_new_requests()
    with pytest.raises(UnavailableError, match="being deleted"):
        await up.predictions.predict(request())
    call.answer()
    check_rows(await work, request())


async def test_a_piece_that_ends_its_routers_is_given_up(up: Up) -> None:
    """A broken link says nothing of the router behind it; Serve's call does."""
    work = asked(up, request())
    broken = int(up.routers.way == "links")
    if broken:
        (await up.routers.until(1))[0].fail(LinkBrokenError())
    for number in range(6):
        (await up.routers.called(broken + number + 1)).fail(CrashedError())
    with pytest.raises(PoisonedRequestError, match="6 routers in a row died"):
        await work
    assert len(up.routers.calls) == broken + 6
    assert up.routers.counted == ["links"] * broken + ["serve"] * 6
