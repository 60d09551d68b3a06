"""The messages of the Inference service: a request as the validator reads it, and its replies."""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import InvalidRequestError
from router.gateway.input.request.base import renamed
from router.gateway.input.request.model import GrpcRequest
from router.gateway.input.routed import rows_shape
from router.gateway.input.tokenizer import Tokenizer
from router.gateway.input.validate import CheckedRequest, Validator
from router.gateway.service import Collected, Delta, prompt_rows
from router.messages.request import Received, TokenLogprobs, Usage
from router.protos import inference_pb2

_SAMPLING = inference_pb2.Sampling.DESCRIPTOR.fields_by_name
_LISTS = (inference_pb2.TokenIds, inference_pb2.Texts)
"""Messages that stand for their only field, since a list cannot be in a ``oneof``."""


def plain(message: Any) -> Any:
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
            given[field.name] = value if field.message_type is None else plain(value)
    return given


def _plain_list(values: Any, kind: Any) -> Any:
    if kind is None:
        return list(values)
    return dict(values) if kind.GetOptions().map_entry else [plain(value) for value in values]


def checked_message(validator: Validator, request: Any, streamed: bool) -> CheckedRequest:
    """Read and check a ``GenerateRequest``; what is wrong is named by its path in the message."""
    given = plain(request)
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
        raise InvalidRequestError("is missing; send prompt, prompt_token_ids or messages", "prompt")
    return str(given)


def reply_of(
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
