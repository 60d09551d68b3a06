"""The routers behind a gateway: a Ray call for each request, early tokens over the token link.

When the router of a request dies, the request goes to another router with the tokens that its
client has. The new router forces these tokens, and draws are a function of (seed, choice,
position), so the rest is what the dead router would have sent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import ray
from opentelemetry.trace import Span
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.errors import (
    ExpertMeshError,
    InternalError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    UnavailableError,
    being_deleted,
    error_from_wire,
)
from cluster.reports import Samples
from cluster.spec import OnExpertLoss
from router.control.client import HandleController
from router.control.placement_view import PlacementView, PlacementWatcher
from router.control.readiness import Readiness, is_its_turn, readiness
from router.gateway.inbox import Inbox, Reply, put_reply
from router.gateway.limits import RETRY_AFTER_S
from router.messages.request import GenerationRequest, Receipts, TokenEvent, merge_events
from router.messages.token_link import LinkAddress, LinkServer
from router.observability.tracing import as_current, gateway_span
from router.retry import Retries, RetryBudget, RetryPolicy

RESEND = RetryPolicy(first_delay_s=0.1, max_delay_s=1.0)
RESUMED_TIMES = 3
"""How often a router of the model that has given tokens is looked for after a redeploy."""
OTHER_TEXT_S = 5.0
"""How long a router with this gateway's tokenizer is looked for; gateways and routers of a redeploy
start at different times."""
TURN_S, TURN_CHECK_S = 10.0, 0.1
RESEND_TOKENS = 8192
"""The budget for sending requests again. When a router dies, a gateway may lose all of its requests
at once; sending them again must take less than half of the budget."""
MESSAGES_PER_S = 500
MAX_PAUSE_S = 0.1
"""From ``MESSAGES_PER_S`` messages of all streams on, a message carries several tokens.

A message costs gateway and client together more than a token costs router and experts. The pause
between two messages of a stream is at most ``MAX_PAUSE_S``, so that a reader sees the text as it
comes.
"""

logger = logging.getLogger("expertmesh.gateway")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One sending of a request: its id on the wire, and the choices that need no more tokens."""

    wire_id: str
    stopped: set[int]


class RayUpstream:
    """Implements :class:`router.gateway.service.Upstream` over Serve handles."""

    def __init__(
        self,
        controller: DeploymentHandle,
        routers: Mapping[str, DeploymentHandle],
        max_calls: int,
        on_expert_loss: OnExpertLoss,
        is_wanted: Callable[[], bool],
        samples: Callable[[], Samples],
    ) -> None:
        """``routers`` are handles by model id. Needs a running event loop.

        ``max_calls`` is the number of requests that the routers of one model hold, running and
        waiting. The gateway refuses more requests itself, since a router's refusal costs as much as
        an accepted call. ``on_expert_loss`` is the deployment's; readiness depends on it.
        ``is_wanted`` asks Serve whether the application shall run. ``samples`` returns the
        gateway's own samples.
        """
        self._on_expert_loss = on_expert_loss
        self._routers = routers
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._view = PlacementView()
        self._is_deleted = False
        self._refuses_new = False
        self._watcher = PlacementWatcher(
            "gateway",
            self._view,
            HandleController(controller),
            is_wanted,
            self.end_requests,
            samples,
        )
        self._inboxes: dict[str, Inbox] = {}
        self._num_streams = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._attempts: dict[str, _Attempt] = {}
        self._budget = RetryBudget(RESEND_TOKENS)
        self._link = LinkServer(ray.util.get_node_ip_address(), self._on_tokens)
        self._address: asyncio.Task[LinkAddress] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See :class:`Upstream`; resends the request when its router dies."""
        if self._refuses_new:
            raise being_deleted()
        receipts = Receipts(request)
        retries = Retries(RESEND, self._budget)
        stopped: set[int] = set()
        other_text_s = self._loop_s() + OTHER_TEXT_S
        with gateway_span(request, receipts) as span:
            for number in itertools.count():
                attempt = _Attempt(f"{request.request_id}#{number}", stopped)
                self._attempts[request.request_id] = attempt
                resent = replace(
                    request, request_id=attempt.wire_id, received=receipts.received(stopped)
                )
                try:
                    async with aclosing(self._attempt(resent, receipts, stopped, span)) as events:
                        async for event in events:
                            yield event
                    retries.succeeded()
                    return
                except ModelReplacedError as error:
                    if receipts.has_tokens() and number >= RESUMED_TIMES:
                        raise _not_resumed(request, error) from None
                    if isinstance(error, _OtherTextError) and self._loop_s() > other_text_s:
                        raise error from None
                    delay_s = retries.next_delay_s(request.remaining_s())
                    if delay_s is None:
                        raise
                    await asyncio.sleep(delay_s)
                except (RayActorError, DeploymentUnavailableError, OverloadedError) as error:
                    delay_s = _resend_delay_s(error, retries, number > 0, request.remaining_s())
                    logger.warning("a router was lost (%s); sending again", type(error).__name__)
                    await asyncio.sleep(delay_s)
                finally:
                    self._attempts.pop(request.request_id, None)

    async def _attempt(
        self, request: GenerationRequest, receipts: Receipts, stopped: set[int], span: Span
    ) -> AsyncGenerator[TokenEvent, None]:
        address = await self._listening()
        if self._is_deleted:
            raise being_deleted()
        self._check_room(request.model)
        with as_current(span):  # Serve sends its context with the call
            call = self._routers[request.model].generate.remote(request.to_wire(), address)
        inbox = Inbox()
        self._inboxes[request.request_id] = inbox
        self._num_streams += request.streamed
        reply = asyncio.create_task(put_reply(call, inbox))
        self._calls[request.model] += 1
        reply.add_done_callback(lambda _: self._calls.subtract([request.model]))
        try:
            while True:
                pause_s = min(self._num_streams / MESSAGES_PER_S, MAX_PAUSE_S)
                events, end = await inbox.take(pause_s)
                for index in stopped.intersection(e.index for e in events if not e.finish_reason):
                    self._link.stop_choice(request.request_id, index)
                for event in merge_events(filter(None, map(receipts.take, events))):
                    yield event
                if end is not None:
                    for event in filter(None, map(receipts.take, _events(end))):
                        yield event
                    return
        finally:
            del self._inboxes[request.request_id]
            self._num_streams -= request.streamed
            self._link.forget(request.request_id)
            if receipts.all_finished():
                # The reply has no new tokens; it is received in the background.
                self._leaving.add(reply)
                reply.add_done_callback(self._leaving.discard)
            elif not reply.done():
                call.cancel()
                reply.cancel()

    def _check_room(self, model: str) -> None:
        """Raise :class:`OverloadedError` when the routers of a model are full."""
        if self._calls[model] >= self._max_calls:
            message = f"the routers are full: they hold {self._max_calls} requests"
            raise OverloadedError(message, "queue", RETRY_AFTER_S)

    def refuse_new_requests(self) -> None:
        """Refuse new requests from now on; those under way go on. Readiness turns negative."""
        self._refuses_new = True

    def end_requests(self) -> None:
        """End all requests; Serve waits for them before it ends a replica. Refuses new ones."""
        self._is_deleted = True
        for inbox in self._inboxes.values():
            inbox.end(being_deleted())

    async def _listening(self) -> LinkAddress:
        if self._address is None:
            self._address = asyncio.ensure_future(self._link.start())
        return await asyncio.shield(self._address)  # other requests wait for it too

    def _on_tokens(self, request_id: str, event: TokenEvent) -> bool:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put(event)
        return inbox is not None

    async def take_turn(self, models: Sequence[str]) -> None:
        """Return once this gateway is to serve ``models``, by their keys.

        On a redeploy that is when their routers do (:func:`router.control.readiness.is_its_turn`):
        until then the earlier gateway is there, whose tokenizer is that of the earlier routers.
        Without any placement it is after :data:`TURN_S`.
        """
        until_s = self._loop_s() + TURN_S
        while not all(is_its_turn(self._view.placement, model) for model in models):
            if self._view.placement is None and self._loop_s() > until_s:
                return
            await asyncio.sleep(TURN_CHECK_S)

    def _loop_s(self) -> float:
        return asyncio.get_running_loop().time()

    def stop(self, request_id: str, index: int) -> None:
        """See :class:`Upstream`."""
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            attempt.stopped.add(index)  # a router that takes over must stop it too
            self._link.stop_choice(attempt.wire_id, index)

    def ready(self) -> Readiness:
        """See :class:`Upstream`."""
        ready = readiness(
            self._view.placement, self._routers, self._view.loop_age_s(), self._on_expert_loss
        )
        if self._is_deleted or self._refuses_new:
            return replace(ready, reason=being_deleted().message, is_deleted=True)
        return ready


class _OtherTextError(ModelReplacedError):
    """The router's tokenizer is not that by which this gateway has made ids of text."""


def _not_resumed(request: GenerationRequest, error: ModelReplacedError) -> ExpertMeshError:
    """Return the error of tokens that no router here goes on from; a client's own are refused."""
    for index, choice in enumerate(request.received):
        if choice.token_ids:
            return InvalidRequestError(
                f"{choice.identity!r:.80} is not the model that is served now; its tokens cannot "
                "be gone on from",
                f"resume[{index}].identity",
            )
    return error


def _resend_delay_s(
    error: Exception, retries: Retries, is_resent: bool, remaining_s: float
) -> float:
    """Return the seconds until a request is sent again; raises its client's error if it is not.

    A full queue refuses a new request. A request that a router has accepted waits for room.
    """
    retry_after_s = None
    if isinstance(error, OverloadedError):
        retry_after_s = error.retry_after_s
        if not is_resent or retry_after_s is None:
            raise error
    delay_s = retries.next_delay_s(remaining_s, retry_after_s)
    if delay_s is None:
        raise UnavailableError("the router is not reachable", "", 1.0) from None
    return delay_s


def _events(reply: Reply) -> list[TokenEvent]:
    """Return the events of a reply; raises the error if the reply is an error."""
    if isinstance(reply, BaseException):
        raise _typed(reply)
    if "replaced" in reply:
        raise _OtherTextError if reply["has_other_text"] else ModelReplacedError
    if "error" in reply:
        raise error_from_wire(reply["error"])
    return [TokenEvent.from_wire(wire) for wire in reply["events"]]


def _typed(error: BaseException) -> BaseException:
    """Return an error for the client, or an error that means that the request is sent again."""
    if isinstance(error, (RayActorError, DeploymentUnavailableError, ExpertMeshError)):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("the router's queue is full", "queue", 1.0)
    if isinstance(error, RayTaskError):
        logger.error("a router failed: %s", error)
    else:
        logger.error("a call to a router failed: %r", error)
    return InternalError("the router failed")
