"""The routers behind a gateway: a call for each request, early tokens over the token link.

When the router of a request dies, the request goes to another router with the tokens that its
client has. The new router forces these tokens, and draws are a function of (seed, choice,
position), so the rest is what the dead router would have sent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

import ray
from opentelemetry.trace import Span
from ray.exceptions import RayError

from cluster.errors import (
    DeadlineExceededError,
    ExpertMeshError,
    InvalidRequestError,
    ModelReplacedError,
    OverloadedError,
    being_deleted,
    error_from_wire,
)
from router.control.readiness import Readiness
from router.gateway.limits.room import GRACE_S, RETRY_AFTER_S
from router.gateway.output.inbox import Inbox, Reply, put_reply
from router.gateway.upstream.deployment import Deployment
from router.gateway.upstream.resend import (
    RESEND,
    RESEND_TOKENS,
    ROUTER_LOST,
    TOLD_S,
    RouterDeaths,
    failure_of,
    resend_delay_s,
)
from router.gateway.upstream.router_links import RouterCalls
from router.messages.link import LinkAddress
from router.messages.receipts import DeliveredTokens, merge_events
from router.messages.request import GenerationRequest, TokenEvent
from router.messages.token_link import TokenReceiver
from router.observability.tracing import gateway_span
from router.retry import Retries, RetryBudget

RESUMED_TIMES = 3
"""How often a router of the model that has given tokens is looked for after a redeploy."""
OTHER_TEXT_S = 5.0
"""How long a router with this gateway's tokenizer is looked for; gateways and routers of a redeploy
start at different times."""
NODES_TIMEOUT_S = 10.0
"""How long Ray may take to tell its nodes."""
MESSAGES_PER_S = 320
MAX_PAUSE_S = 0.1
"""From ``MESSAGES_PER_S`` messages of all streams on, a message carries several tokens.

A message costs gateway and client together more than a token costs router and experts. The pause
between two messages of a stream is at most ``MAX_PAUSE_S``, so that a reader sees the text as it
comes.
"""

logger = logging.getLogger("expertmesh.gateway")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One sending of a request: its id on the wire, and the choices that need no more tokens.

    ``deaths`` are those of the routers of earlier sendings.
    """

    wire_id: str
    stopped: set[int]
    deaths: RouterDeaths


class RayUpstream:
    """Implements :class:`router.gateway.service.Upstream`."""

    def __init__(
        self,
        deployment: Deployment,
        routers: Mapping[str, RouterCalls],
        max_held: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``routers`` are by model id. Needs a running event loop.

        ``max_held`` is the number of choices that the routers of one model hold, running and
        waiting. The gateway refuses more itself, since a router's refusal costs as much as an
        accepted call. ``tls`` encrypts the token links of other nodes: from the first node of Ray
        beside this one, or the first router there, routers can connect by TCP.
        """
        self._deployment = deployment
        deployment.on_end(self._end_requests)
        self._routers = routers
        self._max_held = max_held
        self._held: Counter[str] = Counter()
        self._inboxes: dict[str, Inbox] = {}
        self._num_streams = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._attempts: dict[str, _Attempt] = {}
        self._budget = RetryBudget(RESEND_TOKENS)
        host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
        self._link = TokenReceiver(node, host, self._on_tokens, self._on_alone, tls)
        for calls in routers.values():
            calls.on_node = self._link.expect
        self._looking = asyncio.create_task(self._look_for_nodes())

    async def _look_for_nodes(self) -> None:
        """Let routers of Ray's other nodes connect.

        Where Ray's head does not answer, routers' answers to the gateway tell of them.
        """
        try:
            async with asyncio.timeout(NODES_TIMEOUT_S):
                nodes = await asyncio.to_thread(ray.nodes)
        except (RayError, RuntimeError, TimeoutError) as error:
            logger.warning("Ray did not list its nodes (%s)", type(error).__name__)
            return
        for node in nodes:
            if node["Alive"]:
                self._link.expect(node["NodeID"])

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See :class:`Upstream`; resends the request when its router dies.

        A router that is full is no end of it either, while there is a link to another.
        """
        self._deployment.check_open()
        receipts = DeliveredTokens(request)
        retries = Retries(RESEND, self._budget)
        stopped: set[int] = set()
        deaths, is_lost, is_resent, has_serve_refused = RouterDeaths(), False, False, False
        calls, asked = self._routers[request.model], set[LinkAddress]()
        other_text_s = self._loop_s() + OTHER_TEXT_S
        with gateway_span(request, receipts) as span:
            for number in itertools.count():
                attempt = _Attempt(f"{request.request_id}#{number}", stopped, deaths)
                self._attempts[request.request_id] = attempt
                deaths.is_alone, num_asked = False, len(asked)
                # After a death all tokens travel early, so that progress is seen.
                resent = replace(
                    request,
                    request_id=attempt.wire_id,
                    received=receipts.received(stopped),
                    streamed=request.streamed or deaths.has_any,
                    alone=deaths.ask_alone,
                )
                try:
                    called = self._attempt(resent, receipts, stopped, span, is_lost, asked)
                    async with aclosing(called) as events:
                        async for event in events:
                            yield event
                    retries.succeeded()
                    return
                except ModelReplacedError as error:
                    if receipts.has_any() and number >= RESUMED_TIMES:
                        raise _not_resumed(request, error) from None
                    if isinstance(error, _TokenizerMismatchError) and self._loop_s() > other_text_s:
                        raise error from None
                    delay_s = retries.next_delay_s(request.remaining_s())
                    if delay_s is None:
                        raise
                    is_resent = True
                    await asyncio.sleep(delay_s)
                except (*ROUTER_LOST, OverloadedError) as error:
                    is_full = isinstance(error, OverloadedError) and error.retry_after_s is not None
                    is_by_serve = len(asked) == num_asked  # links may have come since
                    if (
                        is_full
                        and not (is_by_serve and has_serve_refused)
                        and calls.has_other(asked)
                    ):
                        has_serve_refused |= is_by_serve
                        await asyncio.sleep(0)  # the call that was refused is no longer held
                        continue
                    delay_s = resend_delay_s(error, retries, is_resent, request.remaining_s())
                    logger.warning("a router was lost (%s); retrying", type(error).__name__)
                    is_lost |= not isinstance(error, OverloadedError)
                    is_resent = True
                    asked.clear()
                    await asyncio.sleep(max(delay_s, TOLD_S) if deaths.ask_alone else delay_s)
                    deaths.note(error, receipts.progress())
                finally:
                    self._attempts.pop(request.request_id, None)

    async def _attempt(
        self,
        request: GenerationRequest,
        receipts: DeliveredTokens,
        stopped: set[int],
        span: Span,
        by_serve: bool,
        asked: set[LinkAddress],
    ) -> AsyncGenerator[TokenEvent, None]:
        address = await self._link.start()
        if self._deployment.is_deleted:
            raise being_deleted()
        num_choices = sum(not request.received_of(i).finished for i in range(request.sampling.n))
        self._check_room(request.model, num_choices)
        wire = {"request": request.to_wire(), "address": address.to_wire()}
        call = self._routers[request.model].call(wire, span, by_serve, asked)
        inbox = Inbox()
        self._inboxes[request.request_id] = inbox
        self._num_streams += request.streamed
        reply = asyncio.create_task(put_reply(call, inbox))
        # GRACE_S past the deadline, so that the router's own error comes first.
        late = DeadlineExceededError("the request timed out before its last token")
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(request.remaining_s() + GRACE_S, inbox.expire, late)
        self._held[request.model] += num_choices
        reply.add_done_callback(lambda _: self._held.subtract({request.model: num_choices}))
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
            expiry.cancel()
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

    def _check_room(self, model: str, num_choices: int) -> None:
        """Raise :class:`OverloadedError` when the routers of a model are full.

        A single request may have more choices than they hold.
        """
        held = self._held[model]
        if held and held + num_choices > self._max_held:
            message = f"the routers are full: they hold {held} of at most {self._max_held} choices"
            raise OverloadedError(message, "queue", RETRY_AFTER_S)

    def _end_requests(self) -> None:
        for inbox in self._inboxes.values():
            inbox.end(being_deleted())

    def _on_tokens(self, request_id: str, event: TokenEvent) -> bool:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put(event)
        return inbox is not None

    def _on_alone(self, wire_id: str, is_alone: bool) -> None:
        attempt = self._attempts.get(wire_id.rpartition("#")[0])
        if attempt is not None and attempt.wire_id == wire_id:
            attempt.deaths.is_alone = is_alone

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
        return self._deployment.ready()


class _TokenizerMismatchError(ModelReplacedError):
    """The router's tokenizer differs from this gateway's."""


def _not_resumed(request: GenerationRequest, error: ModelReplacedError) -> ExpertMeshError:
    """Return the error for tokens that no router can resume; reject those the client sent."""
    for index, choice in enumerate(request.received):
        if choice.is_begun:
            return InvalidRequestError(
                f"{choice.identity!r:.80} is not the model that is served now, which cannot "
                "continue its tokens; send the request again without resume",
                f"resume[{index}].identity",
            )
    return error


def _events(reply: Reply) -> list[TokenEvent]:
    """Return the events of a reply; raises the error if the reply is an error."""
    if isinstance(reply, BaseException):
        raise failure_of(reply)
    if "replaced" in reply:
        raise _TokenizerMismatchError if reply["has_other_text"] else ModelReplacedError
    if "error" in reply:
        raise error_from_wire(reply["error"])
    return [TokenEvent.from_wire(wire) for wire in reply["events"]]
