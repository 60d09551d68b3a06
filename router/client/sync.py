"""The synchronous client.

``generate`` and ``stream`` outlive a server: where the gateway, its proxy or the connection is lost
they ask again within their deadline, and a stream goes on from the tokens that it has.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from router.client.types import ModelInfo, Reply, Sampling, UnreachableError
from router.client.wire import (
    CHANNEL_OPTIONS,
    call_options,
    reply_of,
    sampling_message,
    status_wire,
    typed_error,
)
from router.protos import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_RETRY = RetryPolicy(first_delay_s=0.1, max_delay_s=2.0)
_INFO_TIMEOUT_S = 10.0


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
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
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
                    return [
                        reply_of(answer),
                        *(reply_of(choice) for choice in answer.other_choices),
                    ]

    def _generate(self, attempts: Attempts) -> Any:
        request, options = attempts.request(), call_options(attempts)
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
        call = self._inference.GenerateStream(attempts.request(), **call_options(attempts))
        try:
            while (message := self._call(lambda: next(call, None))) is not None:
                reply = reply_of(message)
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
        return ClusterStatus.from_wire(status_wire(answer))

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
            request.sampling.CopyFrom(sampling_message(sampling or Sampling()))
            if self._retry is not None and not request.sampling.HasField("seed"):
                request.sampling.seed = secrets.randbits(63)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"cannot be sent: {error}") from None
        return request

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            answer = work()
        except grpc.RpcError as error:
            typed = typed_error(error)
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
