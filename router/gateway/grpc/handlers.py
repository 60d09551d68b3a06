"""The gRPC methods, from request bytes to reply messages, without Serve and without gRPC.

Each raises :class:`cluster.errors.ExpertMeshError`; ``service.py`` turns that into a status. A new
method of the Admin service is a line in :data:`ADMIN_CALLS`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from cluster.errors import InvalidRequestError, TooLargeError, UnknownModelError, shown
from cluster.reports import ClusterStatus
from router.gateway.input import tokens
from router.gateway.input.prompts import checked
from router.gateway.input.request.base import renamed
from router.gateway.input.request.model import GrpcRequest, TokenizeRequest
from router.gateway.input.routed import rows_shape
from router.gateway.input.tokenizer import Tokenizer
from router.gateway.input.validate import CheckedRequest, Validator
from router.gateway.limits.room import Share
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE
from router.gateway.service import Collected, Delta, GenerationService, prompt_rows
from router.messages.request import Received, TokenLogprobs, Usage
from router.protos import admin_pb2, inference_pb2
from router.protos.parse import parsed
from router.security.keys import Caller

if TYPE_CHECKING:
    from router.gateway.admin import Admin

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
SERVICES = (INFERENCE_SERVICE.full_name, PREDICTION_SERVICE.full_name)
"""The services that a health check may name; the empty name is the whole server."""

ADMIN_CALLS: Mapping[str, Callable[[Admin, Any], Awaitable[Any]]] = {
    "GetStatus": lambda admin, request: admin.status(),
    "GetLoad": lambda admin, request: admin.load(),
    "GetUsage": lambda admin, request: admin.usage(),
    "Rebalance": lambda admin, request: admin.rebalance(request.dry_run),
    "Scale": lambda admin, request: admin.scale(request.actors, request.pool, request.dry_run),
    "Drain": lambda admin, request: admin.drain(request.target, request.dry_run),
    "SetCopies": lambda admin, request: admin.set_copies(
        request.model,
        request.layer,
        request.expert,
        request.copies,
        request.dry_run,
        request.all_experts,
    ),
}
"""The methods of the Admin service; each returns a report that has the fields of its reply."""

EPOCH_KEY = "expertmesh-epoch"
VERSION_KEY = "expertmesh-placement-version"
LOOP_AGE_KEY = "expertmesh-controller-loop-age-s"

_SAMPLING = inference_pb2.Sampling.DESCRIPTOR.fields_by_name
_LISTS = (inference_pb2.TokenIds, inference_pb2.Texts)
"""Messages that stand for their only field, since a list cannot be in a ``oneof``."""


class GrpcHandlers:
    """Answers requests through the :class:`GenerationService` and :class:`Admin`."""

    def __init__(self, service: GenerationService, admin: Admin) -> None:
        self.service = service
        self.admin = admin

    async def generate(self, data: bytes, caller: Caller) -> Any:
        """Run a caller's ``GenerateRequest`` to its end and return one ``GenerateReply``."""
        with self.service.room.bodies.share_of(caller.name) as share:
            checked = await self._check(data, False, share)
            wholes = [Collected() for _ in range(checked.request.sampling.n)]
            usage: Usage | None = None
            async with aclosing(self._deltas(checked, caller)) as deltas:
                async for delta in deltas:
                    wholes[delta.index].add(delta)
                    usage = delta.usage
        reply, *others = [
            _reply(index, whole, checked, None if index else usage)
            for index, whole in enumerate(wholes)
        ]
        reply.other_choices.extend(others)
        return reply

    async def generate_stream(self, data: bytes, caller: Caller) -> AsyncGenerator[Any, None]:
        """Run a caller's ``GenerateRequest`` and yield a ``GenerateReply`` per delta."""
        with self.service.room.bodies.share_of(caller.name) as share:
            checked = await self._check(data, True, share)
            async with aclosing(self._deltas(checked, caller)) as deltas:
                async for delta in deltas:
                    yield _reply(delta.index, delta, checked, delta.usage)

    async def get_model_info(self, data: bytes) -> Any:
        """Return the description of one model, or of all models where the request names none."""
        request = parsed(inference_pb2.GetModelInfoRequest, data)
        models = self.service.models()
        if request.model:
            models = [self.service.validator.model(request.model).info]
        names = inference_pb2.ModelInfo.DESCRIPTOR.fields_by_name
        infos = [
            inference_pb2.ModelInfo(**{name: getattr(model, name) for name in names})
            for model in models
        ]
        return inference_pb2.GetModelInfoReply(models=infos)

    async def tokenize(self, data: bytes) -> Any:
        """Return the tokens of a ``TokenizeRequest``."""
        given = _plain(parsed(inference_pb2.TokenizeRequest, data))
        asked = self.service.validator.read(TokenizeRequest, given)
        found = tokens.tokenize(self.service.validator, asked)
        return inference_pb2.TokenizeReply(
            token_ids=found.token_ids, tokens=found.texts, max_model_len=found.max_model_len
        )

    async def detokenize(self, data: bytes) -> Any:
        """Return the text of a ``DetokenizeRequest``."""
        request = parsed(inference_pb2.DetokenizeRequest, data)
        ids = list(request.token_ids)
        text = tokens.detokenize(self.service.validator, request.model, ids, "token_ids")
        tokenizer = self.service.validator.model(request.model).tokenizer
        return inference_pb2.DetokenizeReply(
            text=text,
            tokens=map(tokenizer.token_text, ids),
            special=[token_id in tokenizer.skipped_ids for token_id in ids],
        )

    async def administer(self, method: str, data: bytes) -> Any:
        """Answer a method of the Admin service, from its request to its reply."""
        rpc = ADMIN_SERVICE.methods_by_name[method]
        request = parsed(GetMessageClass(rpc.input_type), data)
        report = await ADMIN_CALLS[method](self.admin, request)
        return GetMessageClass(rpc.output_type)(**_reply_fields(report))

    async def check_health(self, data: bytes) -> Any:
        """Answer ``grpc.health.v1.Health/Check``; an unknown service is NOT_FOUND."""
        name = parse_health_check(data)
        if name and name not in SERVICES:
            served = ", ".join(SERVICES)
            raise UnknownModelError(f"{shown(name)} is not one of {served}", "service")
        return self.health()

    def health(self) -> Any:
        """Return SERVING when every expert has a live copy, else NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        is_ready = self.service.ready().is_ready
        return status(status=status.SERVING if is_ready else status.NOT_SERVING)

    def health_metadata(self) -> list[tuple[str, str]]:
        """Return the placement's epoch and version and the loop's age, as trailing metadata.

        The reply itself has no fields for them.
        """
        ready = self.service.ready()
        metadata: list[tuple[str, str]] = []
        if ready.order is not None:
            metadata += zip((EPOCH_KEY, VERSION_KEY), map(str, ready.order), strict=True)
        if ready.loop_age_s is not None:
            metadata.append((LOOP_AGE_KEY, f"{ready.loop_age_s:.3f}"))
        return metadata

    async def _deltas(self, checked: CheckedRequest, caller: Caller) -> AsyncGenerator[Delta, None]:
        with self.service.charge([checked], caller, "grpc") as charge:
            async with aclosing(self.service.generate(checked, "grpc", charge)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _check(self, data: bytes, streamed: bool, share: Share) -> CheckedRequest:
        """Return the checked request; gRPC keeps its bytes to the end, so ``share`` does too."""
        with self.service.metrics.refusals("grpc"):
            limit = self.service.limits.max_body_bytes
            if len(data) > limit:
                raise TooLargeError(f"the message is over the limit of {limit} bytes")
            share.take(len(data))
            request = parsed(inference_pb2.GenerateRequest, data)
            check = partial(_checked, self.service.validator, request, streamed)
            slow = map(request.sampling.HasField, ("structured_outputs", "routed_experts"))
            return await checked(any(slow), check)


def parse_health_check(data: bytes) -> str:
    """Return the service that a ``HealthCheckRequest`` names."""
    return str(parsed(health_pb2.HealthCheckRequest, data).service)


def _reply_fields(report: Any) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(report)
    if isinstance(report, ClusterStatus):
        for actor in fields["actors"]:
            actor["experts"] = [
                admin_pb2.ExpertKey(model=model, layer=layer, expert=expert)
                for model, layer, expert in actor["experts"]
            ]
    return fields


def _plain(message: Any) -> Any:
    """Return the fields of a message that are given, as JSON would have them."""
    if isinstance(message, _LISTS):
        return list(getattr(message, message.DESCRIPTOR.fields[0].name))
    given: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            if value:
                given[field.name] = _plain_list(value, field.message_type)
        elif not field.has_presence or message.HasField(field.name):
            given[field.name] = value if field.message_type is None else _plain(value)
    return given


def _plain_list(values: Any, kind: Any) -> Any:
    if kind is None:
        return list(values)
    return dict(values) if kind.GetOptions().map_entry else [_plain(value) for value in values]


def _checked(validator: Validator, request: Any, streamed: bool) -> CheckedRequest:
    """Read and check a ``GenerateRequest``; what is wrong is named by its path in the message."""
    given = _plain(request)
    given |= given.pop("sampling", {})
    given.pop("resume", None)
    resume = [
        Received(
            tuple(one.token_ids),
            one.finished,
            not one.inexact,
            one.identity,
            one.prompt_logprobs,
            one.routed_experts,
        )
        for one in request.resume
    ]
    where = _input(request)
    with renamed(_path):
        asked = validator.read(GrpcRequest, given)
        prompt = getattr(asked, where)
        where = "prompt_token_ids.ids" if where == "prompt_token_ids" else where
        return validator.check(asked, prompt, where, streamed, resume)


def _path(field: str) -> str:
    name = re.split(r"[.[]", field, maxsplit=1)[0]
    return f"sampling.{field}" if name in _SAMPLING else field


def _input(request: Any) -> str:
    """Return the name of the request's only input."""
    given = request.WhichOneof("input")
    if request.messages:
        if given is not None:
            raise InvalidRequestError(f"cannot be given together with {given}", "messages")
        return "messages"
    if given is None:
        raise InvalidRequestError("is missing; give it, prompt_token_ids or messages", "prompt")
    return str(given)


def _reply(
    index: int, part: Delta | Collected, checked: CheckedRequest, usage: Usage | None
) -> Any:
    tokenizer = checked.model.tokenizer
    reply = inference_pb2.GenerateReply(
        index=index,
        text=part.text,
        token_ids=part.token_ids,
        logprobs=_logprobs(part, tokenizer),
        finish_reason=part.finish_reason or "",
        usage=None if usage is None else _usage(usage),
        exact=part.exact,
        identity=part.identity,
    )
    for token_id, row in prompt_rows(checked.request, part):
        one = reply.prompt_logprobs.add(token_id=token_id, token=tokenizer.token_text(token_id))
        if row is not None:
            one.logprob, one.rank = row.logprob, row.rank
            one.top.extend(_top(row, tokenizer))
    if part.routed and (routed := checked.request.routed) is not None:
        rows = reply.routed_experts
        rows.data, rows.dtype = bytes(part.routed), routed.dtype
        rows.shape.extend(rows_shape(routed, part.routed))
    return reply


def _usage(usage: Usage) -> Any:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _logprobs(part: Delta | Collected, tokenizer: Tokenizer) -> list[Any]:
    if not part.logprobs:
        return []
    return [
        inference_pb2.TokenLogprob(
            token_id=token_id,
            token=tokenizer.token_text(token_id),
            logprob=row.logprob,
            top=_top(row, tokenizer),
        )
        for token_id, row in zip(part.token_ids, part.logprobs, strict=True)
    ]


def _top(row: TokenLogprobs, tokenizer: Tokenizer) -> list[Any]:
    return [
        inference_pb2.TopLogprob(
            token_id=top_id, token=tokenizer.token_text(top_id), logprob=logprob
        )
        for top_id, logprob in zip(row.top_ids, row.top_logprobs, strict=True)
    ]
