"""From a raw request to a stream of text, below HTTP and gRPC and above the routers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from cluster.errors import Code, InternalError, InvalidRequestError
from router.config.deployment import GatewayConfig
from router.control.readiness import Readiness
from router.gateway.errors import public_error
from router.gateway.input.tokenizer import GatewayModel
from router.gateway.input.tools.reader import CallPart, ChoiceParser, Parsed
from router.gateway.input.validate import CheckedRequest, Validator
from router.gateway.limits.charges import Charge, Charges
from router.gateway.limits.room import Room, SlowReaderWatch
from router.gateway.metrics import Metrics
from router.gateway.output.detokenize import ChoiceText
from router.messages.request import (
    GenerationRequest,
    PromptLogprobs,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from router.observability import catalogue
from router.security.keys import Caller
from router.served import ServedModel

_MIN_LOGPROB = -9999.0
Surface = Literal["http", "grpc"]
Logprobs = TypeVar("Logprobs", bound=TokenLogprobs)


@dataclass(slots=True)  # as router.messages.request.TokenEvent
class Delta:
    """A new piece of one choice; nothing changes it once it is made.

    ``text`` may lag behind ``token_ids``. Where a request's answer is parsed, it is the content
    alone, and ``parsed`` has reasoning and calls too. A ``finish_reason`` (``stop``, ``length`` or
    ``tool_calls``) ends the choice. ``usage`` is set on the last delta of the request,
    ``identity``, the model's, on the first of a choice. ``prompt_logprobs`` are those of prompt
    tokens but the first, in order; ``prompt_start`` of them came before. ``opens`` is true on the
    first delta that a client has of a choice. ``routed`` are packed rows of the
    experts of its next tokens.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    exact: bool = True
    usage: Usage | None = None
    identity: str = ""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    prompt_start: int = 0
    opens: bool = False
    parsed: Parsed | None = None
    routed: bytes = b""


@dataclass(slots=True)
class Collected:
    """All deltas of one choice put together; see :class:`Delta`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    exact: bool = True
    identity: str = ""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    prompt_start: int = 0
    opens: bool = False
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    """Whole calls, of which each is one part."""
    routed: bytearray = field(default_factory=bytearray)

    def add(self, delta: Delta) -> None:
        """Append one delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.exact = self.exact and delta.exact
        self.identity = delta.identity or self.identity
        if delta.prompt_logprobs and not self.prompt_logprobs:
            self.prompt_start = delta.prompt_start
        self.prompt_logprobs += delta.prompt_logprobs
        self.opens = self.opens or delta.opens
        self.routed += delta.routed
        if delta.parsed is not None:
            self._add(delta.parsed)

    def _add(self, parsed: Parsed) -> None:
        self.reasoning += parsed.reasoning
        for part in parsed.calls:
            if part.index == len(self.calls):
                self.calls.append(part)
            else:
                before = self.calls[part.index]
                arguments = before.arguments + part.arguments
                self.calls[part.index] = replace(before, arguments=arguments)


def prompt_rows(
    request: GenerationRequest, part: Delta | Collected
) -> list[tuple[int, PromptLogprobs | None]]:
    """Return the prompt tokens of a part whose log probabilities it has, with these.

    The prompt's first token comes with the first part of a choice, and has none.
    """
    if request.sampling.prompt_logprobs is None:
        return []
    ids, first = request.prompt_token_ids, 1 + part.prompt_start
    ids_of_rows = ids[first : first + len(part.prompt_logprobs)]
    rows: list[tuple[int, PromptLogprobs | None]] = [(ids[0], None)] if part.opens else []
    return [*rows, *zip(ids_of_rows, part.prompt_logprobs, strict=True)]


class Upstream(Protocol):
    """The routers of all models, as a service needs them."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the events of all choices; each choice ends with a ``finish_reason``.

        Raises :class:`cluster.errors.ExpertMeshError`, at the latest
        :data:`router.gateway.limits.room.GRACE_S` past the request's deadline. Closing the
        generator (``aclose``) or cancelling it ends the request at its router.
        """
        ...

    def stop(self, request_id: str, index: int) -> None:
        """Ask for no more tokens of choice ``index``; its events then end.

        Does not wait. An unknown or finished request is not an error.
        """
        ...

    def ready(self) -> Readiness:
        """Return whether every expert has a live copy, and if not, why; waits for nothing."""
        ...


class GenerationService:
    """Sends checked requests upstream and turns tokens into text.

    HTTP and gRPC both use it, and check requests by its ``validator``. ``models`` are the served
    models by id.
    """

    def __init__(
        self,
        models: Mapping[str, GatewayModel],
        limits: GatewayConfig,
        upstream: Upstream,
        metrics: Metrics,
        room: Room,
        charges: Charges,
        mixtures: Collection[str] = (),
    ) -> None:
        """``mixtures`` are the ids of models that another service answers for."""
        self.metrics = metrics
        self.limits = limits
        self.room = room
        self.charges = charges
        self._models = models
        self.validator = Validator(models, limits, mixtures)
        self._upstream = upstream

    def models(self) -> list[ServedModel]:
        """Return the served models, in the deployment's order."""
        return [model.info for model in self._models.values()]

    def ready(self) -> Readiness:
        """Return whether requests can be served, and if not, why."""
        return self._upstream.ready()

    def charge(self, checked: Sequence[CheckedRequest], caller: Caller, surface: Surface) -> Charge:
        """Charge a caller for one call of these requests; see :meth:`Charges.charge`."""
        with self.metrics.refusals(surface):
            num_prepared = sum(len(one.request.prompt_token_ids) for one in checked)
            num_tokens = sum(one.most_tokens for one in checked)
            return self.charges.charge(caller, num_tokens, num_prepared)

    async def generate(
        self, checked: CheckedRequest, surface: Surface, charge: Charge
    ) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all choices; the last one has the usage.

        The request is that of the caller of ``charge``, which learns the used tokens. Raises
        :class:`ExpertMeshError`. Closing or cancelling the generator ends the request upstream, and
        so does a client that does not read. Counts the outcome.
        """
        checked = checked.of(charge.caller)
        with self.room.places.share_of(checked.request.model) as place:
            with self.metrics.refusals(surface):
                place.take(1)

            def cut() -> None:
                self.metrics.count(catalogue.SLOW_READERS, surface)
                place.give_back()

            async with (
                aclosing(self._counted(checked, surface, charge)) as deltas,
                SlowReaderWatch(self.limits.reader_timeout_s, deltas.aclose, cut) as watch,
            ):
                async for delta in deltas:
                    if delta.usage is not None:  # the request is done
                        place.give_back()
                        yield delta
                        continue
                    with watch:
                        yield delta

    async def _counted(
        self, checked: CheckedRequest, surface: Surface, charge: Charge
    ) -> AsyncGenerator[Delta, None]:
        model_id = checked.request.model
        count_tokens = self.metrics.token_counter(model_id)
        started_at_s = time.monotonic()
        num_tokens = len(checked.request.prompt_token_ids)
        self.metrics.started(catalogue.PROMPT_TOKENS, model_id, num_tokens)
        charge.use("prompt", num_tokens)
        code: Code | None = None
        waiting = True
        try:
            async with aclosing(self._deltas(checked)) as deltas:
                async for delta in deltas:
                    if waiting and delta.token_ids:
                        waiting = False
                        self.metrics.first_token(model_id, time.monotonic() - started_at_s)
                    count_tokens(len(delta.token_ids))
                    charge.use("generated", len(delta.token_ids))
                    if delta.finish_reason is not None:
                        self.metrics.count(catalogue.SUCCESS, model_id, delta.finish_reason)
                    if not delta.exact:
                        reason = checked.request.on_expert_loss
                        lost = catalogue.INEXACT_TOKENS, model_id, reason
                        self.metrics.count(*lost, by=len(delta.token_ids))
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):
            code = Code.CANCELLED
            raise
        except Exception as error:
            code = public_error(error).code
            raise
        finally:
            self.metrics.ended(checked.request, surface, code, time.monotonic() - started_at_s)

    async def _deltas(self, checked: CheckedRequest) -> AsyncGenerator[Delta, None]:
        choices = _Choices(checked)
        async with aclosing(self._upstream.generate(checked.request)) as events:
            async for event in events:
                delta = choices.push(event)
                if delta is None:
                    continue
                if delta.finish_reason is not None and event.finish_reason is None:
                    self._upstream.stop(checked.request.request_id, event.index)
                yield delta
                if delta.usage is not None:
                    return
        raise InternalError("the stream of tokens ended before every choice was finished")


class _Choices:
    """The choices of one request: their texts, and the choices that still go on."""

    def __init__(self, checked: CheckedRequest) -> None:
        request = checked.request
        self._prompt_tokens = len(request.prompt_token_ids)
        self._completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}
        """What each choice found of the prompt in the cache of its first router."""
        self._row_bytes = 0 if request.routed is None else request.routed.row_bytes
        self._going: dict[int, ChoiceText] = {}
        self._parsers: dict[int, ChoiceParser] = {}
        """Those of the choices, where the answer is parsed."""
        self._echoes: dict[int, str] = {}
        """The text before that of each choice of which nothing has come."""
        self._n = request.sampling.n
        for index in range(self._n):
            self._begin(checked, index)

    def _begin(self, checked: CheckedRequest, index: int) -> None:
        """Start a choice after the tokens that its client has; their text is not sent again."""
        request, received = checked.request, checked.request.received_of(index)
        self._completion_tokens += len(received.token_ids)
        if received.finished:
            return
        rules = request.sampling.rules
        choice = ChoiceText(
            checked.model.tokenizer,
            checked.stops,
            request.prompt_token_ids,
            0 if rules is None else rules.min_tokens,
            None if checked.answer is None else checked.answer.shown,
        )
        if checked.answer is not None:
            self._parsers[index] = checked.answer.begin()
        _, _, stopped = choice.push(received.token_ids)
        if stopped:
            raise InvalidRequestError(
                "must be true: the resumed text already contains a stop string",
                f"resume[{index}].finished",
            )
        self._going[index] = choice
        if not received.is_begun:
            self._echoes[index] = checked.echo

    def push(self, event: TokenEvent) -> Delta | None:
        """Return the delta of an event, or ``None`` when its choice is finished already."""
        if not 0 <= event.index < self._n:
            raise InternalError("received tokens for a choice that the request does not have")
        choice = self._going.get(event.index)
        if choice is None:
            return None
        text, used, stopped = choice.push(event.token_ids)
        finish_reason = event.finish_reason
        if not stopped and finish_reason is not None:
            rest, stopped = choice.flush()
            text += rest
        if stopped:
            finish_reason = "stop"
        self._completion_tokens += used
        if event.token_ids or finish_reason is not None:
            self._cached_tokens.setdefault(event.index, event.cached_tokens)
        echo = self._echoes.pop(event.index, None)
        delta = Delta(
            index=event.index,
            text=text if echo is None else echo + text,
            token_ids=event.token_ids[:used],
            logprobs=_finite(event.logprobs[:used]),
            finish_reason=finish_reason,
            exact=event.exact,
            identity=event.identity,
            prompt_logprobs=_finite(event.prompt_logprobs),
            prompt_start=event.prompt_start,
            opens=echo is not None,
            routed=self._routed_of(event, used),
        )
        if self._parsers:
            delta = _parsed(delta, self._parsers[event.index])
        if delta.finish_reason is not None:
            del self._going[event.index]
        if self._going:
            return delta
        cached_tokens = min(self._cached_tokens.values())
        usage = Usage(self._prompt_tokens, self._completion_tokens, cached_tokens)
        return replace(delta, usage=usage)

    def _routed_of(self, event: TokenEvent, used: int) -> bytes:
        """Return the rows of an event of whose tokens so many are used: none of the last's."""
        if not event.routed or used == len(event.token_ids):
            return event.routed
        end = self._prompt_tokens + event.start + used - 1
        return event.routed[: max(end - event.routed_start, 0) * self._row_bytes]


def _parsed(delta: Delta, parser: ChoiceParser) -> Delta:
    """Return a delta with its text taken apart."""
    parsed = parser.push(delta.text, delta.finish_reason is not None)
    return replace(
        delta,
        text=parsed.content,
        parsed=parsed,
        finish_reason=parser.finish_reason(delta.finish_reason),
    )


def _finite(rows: tuple[Logprobs, ...]) -> tuple[Logprobs, ...]:
    """Replace minus infinity, which JSON cannot write, by a very small number."""
    if not rows:
        return rows
    return tuple(
        row
        if min((row.logprob, *row.top_logprobs[-1:])) >= _MIN_LOGPROB
        else replace(
            row,
            logprob=max(row.logprob, _MIN_LOGPROB),
            top_logprobs=tuple(max(logprob, _MIN_LOGPROB) for logprob in row.top_logprobs),
        )
        for row in rows
    )
