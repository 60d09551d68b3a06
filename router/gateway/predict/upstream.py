"""The routers of mixtures behind a gateway: a call for each piece of a request's rows.

A prediction has no side effects, and a row's result depends only on the row and the weights. So a
piece whose router dies is sent to another one, and the pieces of a large request are computed at
one time by several routers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from opentelemetry.trace import Span

from cluster.errors import (
    InternalError,
    ModelReplacedError,
    OverloadedError,
    being_deleted,
    error_from_wire,
)
from router.control.readiness import Readiness
from router.gateway.limits.room import RETRY_AFTER_S
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.resend import (
    RESEND,
    RESEND_TOKENS,
    ROUTER_LOST,
    RouterDeaths,
    failure_of,
    resend_delay_s,
)
from router.gateway.upstream.router_links import RouterCalls
from router.messages.prediction import PredictionReply, PredictionRequest
from router.observability.tracing import prediction_span
from router.retry import Retries, RetryBudget

MAX_PIECE_BYTES = 960 * 1024
"""The most bytes of input of a piece with several rows: with its frame, a message of the size up to
which Ray uses no object store (:mod:`cluster.environment`)."""
MAX_PIECE_ROWS = 4096
MAX_PIECES_AT_ONCE = 4
"""The pieces of one request that are under way at one time."""
OTHER_INTERFACE_S = 5.0
"""How long a router with this gateway's inputs and outputs is looked for; gateways and routers of a
redeploy start at different times."""
REPEATED_TIMES = 3
"""How often a request is asked for whole again when a redeploy divides its pieces."""

logger = logging.getLogger("expertmesh.gateway")


@dataclass(slots=True)
class _Asked:
    """The pieces of one request: how many are at a router now, and whether any was answered."""

    span: Span
    under_way: int = 0
    is_answered: bool = False


class _OtherInterfaceError(ModelReplacedError):
    """The router's mixture has other inputs or outputs than the one that this gateway knows."""


class Predictions:
    """The routers of all mixtures."""

    def __init__(
        self, deployment: Deployment, routers: Mapping[str, RouterCalls], max_calls: int
    ) -> None:
        """``routers`` are by model id.

        ``max_calls`` is the number of pieces that the routers of one model hold. The gateway
        refuses more itself, since a router's refusal costs as much as an accepted call.
        """
        self._deployment = deployment
        deployment.on_end(self._end_requests)
        self._routers = routers
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._budget = RetryBudget(RESEND_TOKENS)
        self._answers: set[asyncio.Task[Any]] = set()

    def ready(self) -> Readiness:
        """Return whether every expert has a live copy, and if not, why; waits for nothing."""
        return self._deployment.ready()

    def model_ready(self, model: str) -> Readiness:
        """Return the same of only one model, by its id."""
        return self._deployment.model_ready(model)

    async def predict(self, request: PredictionRequest) -> PredictionReply:
        """Return the outputs of all rows, of one identity; sends a piece again if its router dies.

        The caller bounds the wait. Raises :class:`cluster.errors.ExpertMeshError`. A cancellation
        ends the request at its routers.
        """
        self._deployment.check_open()
        pieces = pieces_of(request)
        with prediction_span(request) as span:
            for _ in range(1 + REPEATED_TIMES):
                replies = await self._all(pieces, span)
                if len({reply.identity for reply in replies}) == 1:
                    reply = joined(replies)
                    span.set_attribute("expertmesh.exact", reply.exact)
                    return reply
                logger.warning("a redeploy split the rows of a request; retrying all of them")
            raise ModelReplacedError

    async def _all(self, pieces: list[PredictionRequest], span: Span) -> list[PredictionReply]:
        asked = _Asked(span)
        if len(pieces) == 1:  # needs no task
            return [await self._piece(pieces[0], asked)]
        replies: list[PredictionReply | None] = [None] * len(pieces)
        waiting = iter(range(len(pieces)))

        async def work() -> None:
            for place in waiting:
                replies[place] = await self._piece(pieces[place], asked)

        workers = [asyncio.create_task(work()) for _ in range(min(MAX_PIECES_AT_ONCE, len(pieces)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [reply for reply in replies if reply is not None]

    async def _piece(self, piece: PredictionRequest, asked: _Asked) -> PredictionReply:
        """Return the reply to one piece.

        A full router refuses a new request. A request of which a router has a piece waits for room.
        After a broken link Serve carries the piece, which tells a dead router from a lost
        connection. Raises :class:`PoisonedRequestError` after too many dead ones.
        """
        retries = Retries(RESEND, self._budget)
        deaths = RouterDeaths()
        other_interface_at_s = time.monotonic() + OTHER_INTERFACE_S
        is_lost = False
        while True:
            asked.under_way += 1
            try:
                reply = await self._ask(piece, asked.span, is_lost)
            except (*ROUTER_LOST, ModelReplacedError, OverloadedError) as error:
                asked.under_way -= 1
                is_other = isinstance(error, _OtherInterfaceError)
                if is_other and time.monotonic() > other_interface_at_s:
                    raise
                is_accepted = is_lost or asked.is_answered or asked.under_way > 0
                delay_s = self._delay_s(error, retries, is_accepted, piece.remaining_s())
                is_lost |= not isinstance(error, OverloadedError)
                deaths.note(error, 0)
            else:
                asked.under_way -= 1
                asked.is_answered = True
                retries.succeeded()
                return reply
            await asyncio.sleep(delay_s)

    def _delay_s(
        self, error: Exception, retries: Retries, is_accepted: bool, remaining_s: float
    ) -> float:
        """Return the seconds until a piece is sent again; raises the error where it is not."""
        if isinstance(error, ModelReplacedError):
            delay_s = retries.next_delay_s(remaining_s)
            if delay_s is None:
                raise error
            return delay_s
        if not isinstance(error, OverloadedError):
            logger.warning("a router was lost (%s); retrying", type(error).__name__)
        return resend_delay_s(error, retries, is_accepted, remaining_s)

    async def _ask(self, piece: PredictionRequest, span: Span, by_serve: bool) -> PredictionReply:
        """Call a router once."""
        if self._deployment.is_deleted:
            raise being_deleted()
        model = piece.model
        if self._calls[model] >= self._max_calls:
            message = f"the routers are full: they already hold {self._max_calls} requests"
            raise OverloadedError(message, "queue", RETRY_AFTER_S)
        call = self._routers[model].call(piece.to_wire(), span, by_serve)
        answer = asyncio.create_task(_awaited(call))
        self._answers.add(answer)
        self._calls[model] += 1
        is_over = False
        try:
            reply = await answer
            is_over = True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # The end of the deployment cancels the answer, but not the client's request.
            if self._deployment.is_deleted and task is not None and not task.cancelling():
                raise being_deleted() from None
            raise
        except Exception as error:
            is_over = True
            raise failure_of(error) from None
        finally:
            self._calls[model] -= 1
            self._answers.discard(answer)
            if not is_over:
                call.cancel()
                answer.cancel()
        return _reply(reply, piece)

    def _end_requests(self) -> None:
        for answer in self._answers:
            answer.cancel()


async def _awaited(call: Any) -> Any:
    return await call


def _reply(wire: Mapping[str, Any], piece: PredictionRequest) -> PredictionReply:
    """Return a router's reply; raises its error, and ``InternalError`` where rows are missing."""
    if "error" in wire:
        if wire.get("has_other_interface"):
            raise _OtherInterfaceError
        raise ModelReplacedError if wire.get("replaced") else error_from_wire(wire["error"])
    reply = PredictionReply.from_wire(wire["reply"])
    for name in piece.outputs:
        if name not in reply.outputs or len(reply.outputs[name]) != piece.num_rows:
            logger.error("a router's reply lacks requested rows of output %s", name)
            raise InternalError("the router failed")
    return reply


def pieces_of(request: PredictionRequest) -> list[PredictionRequest]:
    """Return a request's rows in order, in pieces of nearly equal size within the bounds."""
    num_rows = request.num_rows
    num_bytes = sum(array.nbytes for array in request.inputs.values())
    most = max(1, min(MAX_PIECE_ROWS, MAX_PIECE_BYTES * num_rows // max(1, num_bytes)))
    count = -(-num_rows // most)
    if count == 1:
        return [request]
    bounds = [num_rows * place // count for place in range(count + 1)]
    return [
        replace(
            request,
            request_id=f"{request.request_id}.{place}",
            inputs={name: array[start:end] for name, array in request.inputs.items()},
        )
        for place, (start, end) in enumerate(pairwise(bounds))
    ]


def joined(replies: list[PredictionReply]) -> PredictionReply:
    """Return the replies to the pieces of a request as one, in their order."""
    first, *others = replies
    if not others:
        return first
    outputs = {
        name: np.concatenate([reply.outputs[name] for reply in replies]) for name in first.outputs
    }
    return PredictionReply(outputs, all(reply.exact for reply in replies), first.identity)
