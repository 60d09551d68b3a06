"""A synchronous gRPC client: generate, stream, status and model info, each with a deadline.

``generate`` and ``stream`` outlive a server: where the gateway, its proxy or the connection is lost
they ask again within their deadline, and a stream goes on from the tokens that it has.

Needs neither torch nor ray nor transformers. Errors are those of :mod:`cluster.errors`, rebuilt by
the table that the gateway writes them with.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import (
    ExpertMeshError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from cluster.retry import Retries, RetryBudget, RetryPolicy
from cluster.status import ClusterStatus
from router.attempts import Attempts
from router.gateway.status import DETAILS_KEY, error_from_grpc, is_from_server
from router.protos import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.request import TokenLogprobs

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_RETRY = RetryPolicy(first_delay_s=0.1, max_delay_s=2.0)
_INFO_TIMEOUT_S = 10.0
# The server answers DEADLINE_EXCEEDED itself at the request's timeout; this is the way back.
_GRACE_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's own grows to two minutes; a proxy is back within seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
)
"""Without our server's word: a connection, a proxy or its gateway is gone, or not yet there."""


class UnreachableError(UnavailableError):
    """No ExpertMesh server answers at the address."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request: the prompt once, the output of all choices."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice, or in a stream a new piece of one.

    ``finish_reason`` is ``stop``, ``length`` or, while the choice goes on, ``None``. ``exact`` is
    false when for its tokens, or any before them, an expert's share was replaced or dropped.
    ``usage`` is there on the first choice of :meth:`Client.generate` and a stream's last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    exact: bool
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The numbers of a served model."""

    id: str
    family: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_model_len: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; ``None`` leaves a field to the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None


class Client:
    """Talks to one gateway address; a context manager, safe to use from several threads.

    ``retry`` says how ``generate`` and ``stream`` are tried again when no server answers or it says
    UNAVAILABLE: always within their ``timeout_s``, and all of a client's requests within one
    :class:`RetryBudget`. They then go with a seed that the client draws where none is given, so
    that another attempt comes to the same tokens. An address at which no server has ever answered
    is not tried again. ``None`` tries everything once.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, retry: RetryPolicy | None = DEFAULT_RETRY
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._retry = retry
        self._budget = RetryBudget()
        self._was_reached = False
        self._closed = threading.Event()
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)
        self._default_model = ""

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed.set()
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> list[Reply]:
        """Return all choices of a prompt (text or token ids), by index.

        An empty ``model`` is the first that is served. ``on_expert_loss`` is ``strict``,
        ``next_expert`` or ``drop``; by default the deployment's. Raises
        :class:`ExpertMeshError`, and :class:`UnreachableError` when no server answers.
        """
        request = self._request(prompt, sampling, model, timeout_s, on_expert_loss)
        attempts = self._attempts(request, timeout_s)
        with self._unknown_model_forgotten():
            while True:
                try:
                    answer = self._generate(attempts)
                except ExpertMeshError as error:
                    attempts.failed(error)
                else:
                    attempts.succeeded()
                    return [_reply(answer), *(_reply(choice) for choice in answer.other_choices)]

    def _generate(self, attempts: Attempts) -> Any:
        request, options = attempts.request(), _options(attempts)
        return self._call(lambda: self._inference.Generate(request, **options))

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> Iterator[Reply]:
        """Yield pieces of all choices as they come; leaving the loop cancels the request.

        No token is left out or comes twice when the stream breaks and goes on. Raises as
        :meth:`generate` does, at any piece.
        """
        request = self._request(prompt, sampling, model, timeout_s, on_expert_loss)
        attempts = self._attempts(request, timeout_s)
        with self._unknown_model_forgotten():
            while not attempts.all_finished():
                try:
                    yield from self._stream(attempts)
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        attempts.failed(error)
            attempts.succeeded()

    def _stream(self, attempts: Attempts) -> Iterator[Reply]:
        """Yield what one attempt brings; raises unless it brings the end of every choice."""
        call = self._inference.GenerateStream(attempts.request(), **_options(attempts))
        try:
            while (message := self._call(lambda: next(call, None))) is not None:
                reply = _reply(message)
                attempts.took(reply.index, reply.token_ids, reply.finish_reason, reply.exact)
                yield reply
        finally:
            call.cancel()
        if not attempts.all_finished():
            raise UnavailableError("the stream ended before its last token")

    def _attempts(self, request: Any, timeout_s: float) -> Attempts:
        retries = None if self._retry is None else Retries(self._retry, self._budget)
        return Attempts(request, timeout_s, retries, self._may_go_on)

    def _may_go_on(self, delay_s: float) -> bool:
        """Wait; return whether there can be a server and the client is still open."""
        return self._was_reached and not self._closed.wait(delay_s)

    def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return one model's numbers, or those of all served models when none is named."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        answer = self._call(lambda: self._inference.GetModelInfo(request, timeout=_INFO_TIMEOUT_S))
        names = ModelInfo.__dataclass_fields__
        return [ModelInfo(**{name: getattr(one, name) for name in names}) for one in answer.models]

    def status(self) -> ClusterStatus:
        """Return what the controller knows of the cluster."""
        request = admin_pb2.GetStatusRequest()
        answer = self._call(lambda: self._admin.GetStatus(request, timeout=_INFO_TIMEOUT_S))
        return ClusterStatus.from_wire(_status_wire(answer))

    def _request(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None,
        model: str,
        timeout_s: float,
        on_expert_loss: str | None,
    ) -> Any:
        model = model or self._first_model()
        request = inference_pb2.GenerateRequest(model=model, timeout_s=timeout_s)
        try:
            if isinstance(prompt, str):
                request.prompt = prompt
            else:
                request.prompt_token_ids.SetInParent()
                request.prompt_token_ids.ids.extend(prompt)
            if on_expert_loss is not None:
                request.on_expert_loss = on_expert_loss
            request.sampling.CopyFrom(_sampling_message(sampling or Sampling()))
            if self._retry is not None and not request.sampling.HasField("seed"):
                request.sampling.seed = secrets.randbits(63)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"cannot be sent: {error}") from None
        return request

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            answer = work()
        except grpc.RpcError as error:
            typed = _typed(error)
            self._was_reached |= not isinstance(typed, UnreachableError)
            raise typed from None
        self._was_reached = True
        return answer

    def _first_model(self) -> str:
        # Asked for once: a call before each call would be a second round trip for every answer.
        if not self._default_model:
            self._default_model = self.model_info()[0].id
        return self._default_model

    @contextmanager
    def _unknown_model_forgotten(self) -> Iterator[None]:
        """Ask for the first model again after an answer that what was the first is not served."""
        try:
            yield
        except UnknownModelError:
            self._default_model = ""
            raise


def _sampling_message(sampling: Sampling) -> Any:
    names = [name for name in Sampling.__dataclass_fields__ if name != "stop"]
    given = {name: getattr(sampling, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return inference_pb2.Sampling(**given, stop=sampling.stop)


def _options(attempts: Attempts) -> dict[str, Any]:
    """Return a call's timeout, and whether it waits for a server that is away."""
    if attempts.is_first:
        return {"timeout": attempts.remaining_s + _GRACE_S}
    return {"timeout": max(attempts.remaining_s, 0.0), "wait_for_ready": True}


def _typed(error: Any) -> ExpertMeshError:
    metadata = dict(error.trailing_metadata() or ())
    status_details = metadata.get(DETAILS_KEY)
    code, details = error.code(), error.details() or "no details"
    # A server answers at the request's own timeout, so a deadline without its word is silence.
    if code in _LOST and not is_from_server(status_details):
        return UnreachableError("no ExpertMesh server answers at this address", retry_after_s=1.0)
    return error_from_grpc(code, details, status_details)


def _reply(message: Any) -> Reply:
    rows = tuple(
        TokenLogprobs(
            row.logprob,
            tuple(top.token_id for top in row.top),
            tuple(top.logprob for top in row.top),
        )
        for row in message.logprobs
    )
    usage = Usage(message.usage.prompt_tokens, message.usage.completion_tokens)
    return Reply(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=rows,
        finish_reason=message.finish_reason or None,
        exact=message.exact,
        usage=usage if message.HasField("usage") else None,
    )


def _status_wire(answer: Any) -> dict[str, Any]:
    actors = [
        {
            "actor_id": actor.actor_id,
            "pid": actor.pid,
            "node": actor.node,
            "device": actor.device,
            "generation": actor.generation,
            "experts": [(one.model, one.layer, one.expert) for one in actor.experts],
            "tokens": actor.tokens,
        }
        for actor in answer.actors
    ]
    return {
        "models": list(answer.models),
        "epoch": answer.epoch,
        "placement_version": answer.placement_version,
        "controller_pid": answer.controller_pid,
        "missing_experts": answer.missing_experts,
        "routers": [{"pid": one.pid, "node": one.node} for one in answer.routers],
        "gateways": [{"pid": one.pid, "node": one.node} for one in answer.gateways],
        "actors": actors,
        "min_copies": answer.min_copies,
        "live_copies": answer.live_copies,
    }
