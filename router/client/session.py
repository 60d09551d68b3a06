"""The state of a client and the making of its requests, for both clients; nothing here waits."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.client.access import admin_address_of, key_metadata
from router.client.attempts import Attempts, RequestAttempts
from router.client.types import Message, MixtureInfo, ModelInfo, Sampling, Token
from router.client.wire import (
    models_of,
    sampling_message,
    text_of,
    token_ids_of,
    tokens_of,
    typed_error,
    was_connected,
)
from router.protos import admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.retry import Retries, RetryBudget, RetryPolicy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from router.client.prediction import PredictionAttempts

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_RETRY = RetryPolicy(first_delay_s=0.1, max_delay_s=2.0)
INFO_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 930.0
"""Longer than a gateway waits, so that its own error comes first."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """A call without retries: a stub's method, its request, and the reader of its reply.

    ``address`` tells people where the method is.
    """

    method: Callable[..., Any]
    request: Any
    timeout_s: float
    read: Callable[[Any], Answer]
    address: str

    def start(self) -> Any:
        """Return what the stub's method returns: a reply, or an awaitable reply with asyncio."""
        return self.method(self.request, timeout=self.timeout_s)


class Session:
    """A client's stubs, its retry budget, its first model, and whether a call ever arrived."""

    def __init__(
        self,
        open_channel: Callable[[str], Any],
        address: str,
        retry: RetryPolicy | None,
        api_key: str | None,
        admin_address: str | None,
    ) -> None:
        """``open_channel`` opens a channel of grpc or of grpc.aio to an address.

        ``retry`` is ``None`` for no retries. Raises as :func:`key_metadata` does.
        """
        self._metadata = key_metadata(api_key)
        self._channel = open_channel(address)
        self._admin_address = admin_address or admin_address_of(address)
        self._admin_channel = open_channel(self._admin_address)
        self.channels = (self._channel, self._admin_channel)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._admin_channel)
        self.first_model = ""
        self.was_reached = False
        self._predictions: Any = None
        self._address = address
        self._retry = retry
        self._budget = RetryBudget()

    @property
    def generate(self) -> Callable[..., Any]:
        """The method that answers as a whole."""
        return self._keyed(self._inference.Generate)

    @property
    def generate_stream(self) -> Callable[..., Any]:
        """The method that answers piece by piece."""
        return self._keyed(self._inference.GenerateStream)

    @property
    def infer(self) -> Callable[..., Any]:
        """The method that predicts."""
        return self._keyed(self._prediction_stub().ModelInfer)

    def _keyed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a stub's method that shows the client's key."""
        return partial(method, metadata=self._metadata)

    def model_info(self, model: str) -> Call[list[ModelInfo]]:
        """Return the call for the description of one model, or of all models."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        method = self._keyed(self._inference.GetModelInfo)
        return Call(method, request, INFO_TIMEOUT_S, models_of, self._address)

    def tokenize(
        self, prompt: str | None, messages: Sequence[Message], model: str
    ) -> Call[tuple[int, ...]]:
        """Return the call for the tokens of a prompt or of messages."""
        request = inference_pb2.TokenizeRequest(model=model, prompt=prompt)
        request.messages.extend(
            inference_pb2.Message(role=message.role, content=message.content)
            for message in messages
        )
        method = self._keyed(self._inference.Tokenize)
        return Call(method, request, INFO_TIMEOUT_S, token_ids_of, self._address)

    def detokenize(self, token_ids: Sequence[int], model: str) -> Call[str]:
        """Return the call for the text of tokens; raises as :meth:`attempts` does."""
        return self._detokenize(token_ids, model, text_of)

    def tokens(self, token_ids: Sequence[int], model: str) -> Call[tuple[Token, ...]]:
        """Return the call for the single tokens of ids; raises as :meth:`attempts` does."""
        return self._detokenize(token_ids, model, partial(tokens_of, token_ids))

    def _detokenize(
        self, token_ids: Sequence[int], model: str, read: Callable[[Any], Answer]
    ) -> Call[Answer]:
        try:
            request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"cannot be sent: {error}") from None
        method = self._keyed(self._inference.Detokenize)
        return Call(method, request, INFO_TIMEOUT_S, read, self._address)

    def administer(
        self, name: str, request: Any, timeout_s: float, read: Callable[[Any], Answer]
    ) -> Call[Answer]:
        """Return the call of a method of the Admin service."""
        method = self._keyed(getattr(self._admin, name))
        where = f"{self._admin_address}, where gateways answer operators"
        return Call(method, request, timeout_s, read, where)

    def _prediction_stub(self) -> Any:
        """Return the stub of the Open Inference Protocol, made when it is first needed.

        Other packages have messages of the same names. protobuf takes these once, so a process
        that only generates text must be able to have both.
        """
        if self._predictions is None:
            from router.client.prediction import stub_of

            self._predictions = stub_of(self._channel)
        return self._predictions

    def prediction_attempts(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        outputs: Sequence[str] | None,
        timeout_s: float,
        on_expert_loss: str | None,
    ) -> PredictionAttempts:
        """Return the attempts of a new prediction, within the client's retry budget.

        Raises :class:`InvalidRequestError` for a value that a message cannot carry.
        """
        from router.client.prediction import PredictionAttempts, request_of

        request = request_of(model, inputs, outputs, on_expert_loss)
        return PredictionAttempts(request, timeout_s, self._retries())

    def mixture_info(self, model: str) -> Call[MixtureInfo]:
        """Return the call for the description of a mixture."""
        from router.client.prediction import info_of, metadata_request

        method = self._keyed(self._prediction_stub().ModelMetadata)
        return Call(method, metadata_request(model), INFO_TIMEOUT_S, info_of, self._address)

    def _retries(self) -> Retries | None:
        return None if self._retry is None else Retries(self._retry, self._budget)

    def attempts(
        self,
        prompt: str | Sequence[int] | None,
        messages: Sequence[Message],
        sampling: Sampling | None,
        model: str,
        timeout_s: float,
        on_expert_loss: str | None,
        priority: int,
        cache_salt: str,
    ) -> Attempts:
        """Return the attempts of a new request, within the client's retry budget.

        Raises :class:`InvalidRequestError` for a value that a message cannot carry. The server
        checks all other values.
        """
        request = inference_pb2.GenerateRequest(model=model, timeout_s=timeout_s)
        try:
            request.messages.extend(
                inference_pb2.Message(role=message.role, content=message.content)
                for message in messages
            )
            if isinstance(prompt, str):
                request.prompt = prompt
            elif prompt is not None:
                request.prompt_token_ids.SetInParent()
                request.prompt_token_ids.ids.extend(prompt)
            if on_expert_loss is not None:
                request.on_expert_loss = on_expert_loss
            if priority:
                request.priority = priority
            if cache_salt:
                request.cache_salt = cache_salt
            request.sampling.CopyFrom(sampling_message(sampling or Sampling()))
            if self._retry is not None and not request.sampling.HasField("seed"):
                request.sampling.seed = secrets.randbits(63)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"cannot be sent: {error}") from None
        return Attempts(request, timeout_s, self._retries())

    def retry_delay_s(self, attempts: RequestAttempts, error: ExpertMeshError) -> float:
        """Return the seconds until the next attempt; raises ``error`` if there is none.

        An address that has never taken a connection is not tried again.
        """
        if not self.was_reached:
            raise error
        return attempts.failed(error)

    def failed(self, error: Any, address: str = "") -> ExpertMeshError:
        """Return the typed error of a ``grpc.RpcError``; records whether a server took the call.

        ``address`` is where the call went, by default the client's own address.
        """
        self.was_reached |= was_connected(error)
        return typed_error(error, address or self._address)

    @contextmanager
    def unknown_model_forgotten(self) -> Iterator[None]:
        """Forget the first model when the server no longer serves the requested model."""
        try:
            yield
        except UnknownModelError:
            self.first_model = ""
            raise
