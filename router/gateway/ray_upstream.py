"""The gateway's upstream on Ray: a call to a router per request, early tokens over the link.

When the router replica that serves a request dies, the request is sent to another one with the
tokens that the client has already. Those are forced there, and draws are a function of (seed,
choice, position), so the rest is what the first one would have sent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import ray
from opentelemetry.trace import Span
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import (
    ExpertMeshError,
    InternalError,
    OverloadedError,
    UnavailableError,
    being_deleted,
    error_from_wire,
)
from cluster.reports import (
    ChangeReport,
    ClusterStatus,
    LoadStatus,
    Measurements,
    ProcessSamples,
    ProcessStatus,
    RebalanceReport,
    Samples,
)
from cluster.spec import OnExpertLoss
from router.control.client import HandleController
from router.control.placement_view import PlacementView, PlacementWatcher
from router.control.readiness import Readiness, readiness
from router.gateway.inbox import Inbox, Reply, put_reply, take_events
from router.gateway.limits import RETRY_AFTER_S
from router.messages.request import GenerationRequest, Receipts, TokenEvent, merge_events
from router.messages.token_link import LinkAddress, LinkServer
from router.observability.tracing import as_current, gateway_span
from router.retry import Retries, RetryBudget, RetryPolicy

STATUS_TIMEOUT_S = 5.0
CHANGE_TIMEOUT_S = 900.0
MEASURE_TIMEOUT_S = 2.0
RESEND = RetryPolicy(first_delay_s=0.1, max_delay_s=1.0)
RESEND_TOKENS = 8192
"""A dying router may take along all requests of a gateway at once, which must not use up half."""
MESSAGES_PER_S = 500
MAX_PAUSE_S = 0.1
"""Beyond so many messages of all streams together, tokens travel several to a message.

A message costs gateway and client together more than a token costs router and experts. The pause
between two of a stream's messages is bounded, so that it still reads as it comes.
"""

logger = logging.getLogger("expertmesh.gateway")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One sending of a request: its id on the wire, and the choices that need no more tokens."""

    wire_id: str
    stopped: set[int]


class RayUpstream:
    """Implements :class:`router.gateway.upstream.Upstream` over Serve handles."""

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

        ``max_calls`` is how many requests the routers of one model hold, running and waiting; one
        more is refused here, since a call to a router that refuses it costs as much as one that
        does not. ``on_expert_loss`` is the deployment's, by which it is or is not ready.
        ``is_wanted`` asks Serve whether the application is to run. ``samples`` returns what the
        gateway measures.
        """
        self._on_expert_loss = on_expert_loss
        self._controller = controller
        self._routers = routers
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._view = PlacementView()
        self._is_deleted = False
        self._watcher = PlacementWatcher(
            "gateway",
            self._view,
            HandleController(controller),
            is_wanted,
            self._end_requests,
            samples,
        )
        self._samples = samples
        self._inboxes: dict[str, Inbox] = {}
        self._num_streams = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._attempts: dict[str, _Attempt] = {}
        self._budget = RetryBudget(RESEND_TOKENS)
        self._link = LinkServer(ray.util.get_node_ip_address(), self._on_tokens)
        self._address: asyncio.Task[LinkAddress] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See :class:`Upstream`; resends the request when its router dies."""
        receipts = Receipts(request)
        retries = Retries(RESEND, self._budget)
        stopped: set[int] = set()
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
        with as_current(span):  # Serve takes its context along with the call
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
                events, end = await take_events(inbox, request, pause_s)
                for index in stopped.intersection(e.index for e in events if not e.finish_reason):
                    self._link.stop_choice(request.request_id, index)
                fresh = [f for event in events if (f := receipts.take(event)) is not None]
                for event in merge_events(fresh):
                    yield event
                if end is None:
                    continue
                for event in _events(end):
                    rest = receipts.take(event)
                    if rest is not None:
                        yield rest
                return
        finally:
            del self._inboxes[request.request_id]
            self._num_streams -= request.streamed
            self._link.forget(request.request_id)
            if receipts.all_finished():
                # The reply, which is under way, has nothing new.
                self._leaving.add(reply)
                reply.add_done_callback(self._leaving.discard)
            elif not reply.done():
                call.cancel()
                reply.cancel()

    def _check_room(self, model: str) -> None:
        """Raise :class:`OverloadedError` when a model's routers hold all that they can."""
        if self._calls[model] >= self._max_calls:
            told = f"the routers are full: they hold {self._max_calls} requests"
            raise OverloadedError(told, "queue", RETRY_AFTER_S)

    def _end_requests(self) -> None:
        """End all requests, which Serve waits for before it ends a replica."""
        self._is_deleted = True
        for inbox in self._inboxes.values():
            inbox.end(being_deleted())

    async def _listening(self) -> LinkAddress:
        if self._address is None:
            self._address = asyncio.ensure_future(self._link.start())
        return await asyncio.shield(self._address)  # others wait for it too

    def _on_tokens(self, request_id: str, event: TokenEvent) -> bool:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put(event)
        return inbox is not None

    def stop(self, request_id: str, index: int) -> None:
        """See :class:`Upstream`."""
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            attempt.stopped.add(index)  # another router must be told again
            self._link.stop_choice(attempt.wire_id, index)

    async def status(self) -> ClusterStatus:
        """See :class:`Upstream`."""
        wire = await _answered(self._controller.status.remote(), STATUS_TIMEOUT_S)
        return ClusterStatus.from_wire(wire)

    async def load(self) -> LoadStatus:
        """See :class:`Upstream`."""
        return LoadStatus.from_wire(
            await _answered(self._controller.load.remote(), STATUS_TIMEOUT_S)
        )

    async def rebalance(self, dry_run: bool) -> RebalanceReport:
        """See :class:`Upstream`."""
        return RebalanceReport.from_wire(await _done(self._controller.rebalance.remote(dry_run)))

    async def scale(self, number: int, pool: str, dry_run: bool) -> ChangeReport:
        """See :class:`Upstream`."""
        call = self._controller.scale.remote(number, pool, dry_run)
        return ChangeReport.from_wire(await _done(call))

    async def drain(self, target: str, dry_run: bool) -> ChangeReport:
        """See :class:`Upstream`."""
        call = self._controller.drain.remote(target, dry_run)
        return ChangeReport.from_wire(await _done(call))

    async def set_copies(
        self, model: str, layer: int, expert: int, number: int, dry_run: bool
    ) -> ChangeReport:
        """See :class:`Upstream`."""
        call = self._controller.set_copies.remote(model, layer, expert, number, dry_run)
        return ChangeReport.from_wire(await _done(call))

    async def measurements(self) -> Measurements:
        """See :class:`Upstream`."""
        process = ProcessStatus(os.getpid(), ray.get_runtime_context().get_node_id())
        own = ProcessSamples("gateway", process, self._samples())
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT_S):
                told: Measurements = await self._controller.measurements.remote(own)
        except Exception as error:  # away, restarting, or slow: what is here is told alone
            logger.warning("the controller tells no metrics (%s)", type(error).__name__)
            return Measurements(None, (), (own,))
        return told

    def ready(self) -> Readiness:
        """See :class:`Upstream`."""
        told = readiness(
            self._view.placement, self._routers, self._view.loop_age_s(), self._on_expert_loss
        )
        if self._is_deleted:
            told = replace(told, reason=being_deleted().message, is_deleted=True)
        return told


async def _answered(call: Awaitable[Any], timeout_s: float) -> Any:
    """Return the controller's answer; raises ``UnavailableError`` where there is none in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except (RayActorError, RayServeException, TimeoutError):
        raise UnavailableError("the controller does not answer", "", 1.0) from None


async def _done(call: Awaitable[Any]) -> Any:
    """Return the report of a change that the controller was asked for; raises its error."""
    told = await _answered(call, CHANGE_TIMEOUT_S)
    if "error" in told:
        raise error_from_wire(told["error"])
    return told["report"]


def _resend_delay_s(
    error: Exception, retries: Retries, is_resent: bool, remaining_s: float
) -> float:
    """Return when to send a request again; raises what its client is told if it is not to be.

    A full queue refuses a new request, but one that another router had accepted waits for room.
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
    """Return the reply's events; raises the error that it is."""
    if isinstance(reply, BaseException):
        raise _typed(reply)
    if "error" in reply:
        raise error_from_wire(reply["error"])
    return [TokenEvent.from_wire(wire) for wire in reply["events"]]


def _typed(error: BaseException) -> BaseException:
    """Return the error as one that may leave the gateway, or as one that means "send again"."""
    if isinstance(error, (RayActorError, DeploymentUnavailableError, ExpertMeshError)):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("the router's queue is full", "queue", 1.0)
    if isinstance(error, RayTaskError):
        logger.error("a router failed: %s", error)
    else:
        logger.error("a call to a router failed: %r", error)
    return InternalError("the router failed")
