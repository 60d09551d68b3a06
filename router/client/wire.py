"""Converts between the clients' types and gRPC's messages and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.client.types import (
    Message,
    ModelInfo,
    Reply,
    RequestOptions,
    Sampling,
    Token,
    UnreachableError,
)
from router.messages.request import PromptLogprobs, TokenLogprobs, Usage
from router.messages.routed import LITTLE_ENDIAN
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, error_from_grpc, is_from_server

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's default backoff grows to two minutes; a proxy is back within seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
LOST_S = 1.0
"""How long a client waits at least after a lost connection before it calls again."""
_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
)
"""Codes that mean a lost connection, proxy or gateway where the gateway's details are missing."""
_NEVER_CONNECTED = ("failed to connect", "errors resolving", "DNS resolution failed")
"""How gRPC's details begin for a call that no connection ever took."""


@contextmanager
def sendable() -> Iterator[None]:
    """Raise :class:`InvalidRequestError` for a value that no message can carry."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"cannot be sent: {error}") from None


def generate_request(
    prompt: str | Sequence[int] | None,
    messages: Sequence[Message],
    sampling: Sampling | None,
    model: str,
    timeout_s: float,
    options: RequestOptions,
) -> Any:
    """Return a ``GenerateRequest``; the server checks the values.

    Raises ``TypeError`` for an unknown option, and else as :func:`sendable`.
    """
    if unknown := options.keys() - RequestOptions.__annotations__.keys():
        raise TypeError(f"a request has no option {', '.join(sorted(unknown))}")
    with sendable():
        request = inference_pb2.GenerateRequest(
            model=model,
            prompt=prompt if isinstance(prompt, str) else None,
            messages=conversation(messages),
            sampling=sampling_message(sampling or Sampling()),
            timeout_s=timeout_s,
            **{name: value or None for name, value in options.items()},
        )
        if prompt is not None and not isinstance(prompt, str):
            request.prompt_token_ids.SetInParent()
            request.prompt_token_ids.ids.extend(prompt)
    return request


def conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as protobuf's constructors take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def sampling_message(sampling: Sampling) -> Any:
    """Return a sampling as a message; raises ``TypeError`` or ``ValueError`` for a bad value."""
    names = Sampling.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    form, rows = given.pop("structured_outputs", None), given.pop("routed_experts", None)
    message = inference_pb2.Sampling(**given)
    if rows is not None:
        message.routed_experts.CopyFrom(_rows_message(rows))
    if form is not None:
        message.structured_outputs.CopyFrom(_form_message(form))
    return message


def _form_message(form: Mapping[str, Any]) -> Any:
    """Return the form of an answer as a message; raises as :func:`sampling_message` does."""
    given = dict(form)
    if "json" in given and not isinstance(given["json"], str):
        given["json"] = json.dumps(given["json"])
    if "choice" in given:
        given["choice"] = inference_pb2.Texts(texts=given["choice"])
    return inference_pb2.StructuredOutputs(**given)


def _rows_message(rows: ArrayLike) -> Any:
    """Return experts of tokens as a message; raises as :func:`sampling_message` does."""
    import numpy as np

    ids = np.asarray(rows)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise ValueError("routed_experts must be integers [tokens, MoE layers, experts per token]")
    if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(np.uint16).max:
        raise ValueError("routed_experts must be ids of experts")
    name = "uint8" if ids.max(initial=0) <= np.iinfo(np.uint8).max else "uint16"
    data = ids.astype(LITTLE_ENDIAN[name]).tobytes()
    return inference_pb2.RoutedExperts(data=data, dtype=name, shape=ids.shape)


def _rows_of(message: Any) -> np.ndarray:
    """Return the experts of tokens in a ``RoutedExperts``."""
    import numpy as np

    rows = np.frombuffer(message.data, LITTLE_ENDIAN[message.dtype])
    return rows.astype(message.dtype).reshape(tuple(message.shape))


def typed_error(error: Any, address: str) -> ExpertMeshError:
    """Return the typed error of a ``grpc.RpcError`` at this address."""
    metadata = dict(error.trailing_metadata() or ())
    status_details = metadata.get(DETAILS_KEY)
    code, details = error.code(), error.details() or "no details"
    # A gateway answers within the request's timeout, so a bare DEADLINE_EXCEEDED is not its own.
    if code in _LOST and not is_from_server(status_details):
        reason = f" ({details})" if "handshake" in details.lower() else ""  # of TLS
        return UnreachableError(
            f"no ExpertMesh server answers at {address}{reason}", retry_after_s=LOST_S
        )
    return error_from_grpc(code, details, status_details)


def was_connected(error: Any) -> bool:
    """Return whether a ``grpc.RpcError`` tells of an HTTP/2 connection that took the call.

    False where gRPC does not tell: a call that met its deadline may never have been sent.
    """
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return False
    return not (error.details() or "").startswith(_NEVER_CONNECTED)


def reply_of(message: Any) -> Reply:
    """Return one choice, or a piece of one, of a ``GenerateReply``."""
    rows = tuple(
        TokenLogprobs(
            row.logprob,
            tuple(top.token_id for top in row.top),
            tuple(top.logprob for top in row.top),
        )
        for row in message.logprobs
    )
    given = message.usage
    usage = Usage(given.prompt_tokens, given.completion_tokens, given.cached_tokens)
    return Reply(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=rows,
        finish_reason=message.finish_reason or None,
        exact=message.exact,
        usage=usage if message.HasField("usage") else None,
        prompt_logprobs=tuple(map(_prompt_logprobs, message.prompt_logprobs)),
        routed_experts=_rows_of(message.routed_experts)
        if message.HasField("routed_experts")
        else None,
    )


def _prompt_logprobs(row: Any) -> PromptLogprobs | None:
    if not row.HasField("logprob"):  # the first token's
        return None
    ids = tuple(top.token_id for top in row.top)
    return PromptLogprobs(row.logprob, ids, tuple(top.logprob for top in row.top), row.rank)


def choices_of(answer: Any) -> list[Reply]:
    """Return all choices of a ``GenerateReply``, by index."""
    return [reply_of(answer), *(reply_of(choice) for choice in answer.other_choices)]


def first_model(models: list[ModelInfo]) -> ModelInfo:
    """Return the first model; raises :class:`UnknownModelError` where there is none."""
    if not models:
        raise UnknownModelError("the server has no language model", "model")
    return models[0]


def tokens_of(token_ids: Sequence[int], answer: Any) -> tuple[Token, ...]:
    """Return the tokens of a ``DetokenizeReply`` for these ids."""
    return tuple(map(Token, token_ids, answer.tokens, answer.special))


def models_of(answer: Any) -> list[ModelInfo]:
    """Return the models of a ``GetModelInfoReply``."""
    names = [name for name in ModelInfo.__dataclass_fields__ if name != "moe_layers"]
    return [
        ModelInfo(**{name: getattr(m, name) for name in names}, moe_layers=tuple(m.moe_layers))
        for m in answer.models
    ]
