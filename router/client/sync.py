"""The synchronous client.

``generate`` and ``stream`` survive the loss of a gateway, its proxy or the connection: they ask
again within their deadline, and a stream goes on after the tokens that it has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import ExpertMeshError
from router.client.admin import AdminClient
from router.client.attempts import Attempts
from router.client.session import (
    DEFAULT_ADDRESS,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT_S,
    Answer,
    Call,
    Session,
)
from router.client.tls import ClientTls, channel_opener
from router.client.types import Message, MixtureInfo, ModelInfo, Prediction, Reply, Sampling, Token
from router.client.wire import CHANNEL_OPTIONS, first_model
from router.retry import RetryPolicy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Client(AdminClient):
    """Talks to one gateway address; a context manager, safe to use from several threads.

    ``generate``, ``stream`` and ``predict`` are retried by ``retry`` when no server answers or it
    answers UNAVAILABLE. Retries end with the request's ``timeout_s``, and all requests of a client
    share one :class:`RetryBudget`. The client draws a seed where none is given, so that another
    attempt gives the same tokens. An address that has never taken a connection is not tried again.
    A ``retry`` of ``None`` makes a single attempt.

    ``api_key`` is shown with every call, by default the one in ``EXPERTMESH_API_KEY``.
    ``admin_address`` is where gateways answer operators (``status``, ``scale`` and so on), by
    default the port after that of ``address``. ``tls`` encrypts both, by default as
    ``EXPERTMESH_TLS_CA``, ``_CERT`` and ``_KEY`` say; without it connections are not encrypted.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        api_key: str | None = None,
        admin_address: str | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        open_channel = channel_opener(grpc, tls, CHANNEL_OPTIONS)
        self._session = Session(open_channel, address, retry, api_key, admin_address)
        self._closed = threading.Event()

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed.set()
        for channel in self._session.channels:
            channel.close()

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Reply]:
        """Return all choices of a prompt (text or token ids) or of ``messages``, by index.

        Exactly one of the two is given. The model's chat template renders ``messages``, and the
        reply is the assistant's next message. An empty ``model`` is the first served model.
        ``on_expert_loss`` is ``strict``, ``next_expert`` or ``drop``; the default is the
        deployment's. A request of a lower ``priority`` is handled earlier. With a ``cache_salt``
        only requests of the same salt share the key/value cache of a prompt. Raises
        :class:`ExpertMeshError`, and :class:`UnreachableError` when no server answers.
        """
        model = model or self._first_model()
        attempts = self._session.attempts(
            prompt, messages, sampling, model, timeout_s, on_expert_loss, priority, cache_salt
        )
        with self._session.unknown_model_forgotten():
            while True:
                try:
                    answer = self._call(lambda: attempts.start(self._session.generate))
                except ExpertMeshError as error:
                    self._wait(self._session.retry_delay_s(attempts, error), error)
                else:
                    return attempts.whole(answer)

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generator[Reply, None, None]:
        """Yield pieces of all choices as they come; leaving the loop cancels the request.

        A stream that breaks and goes on neither loses nor repeats a token. Raises as
        :meth:`generate` does, at any piece.
        """
        model = model or self._first_model()
        attempts = self._session.attempts(
            prompt, messages, sampling, model, timeout_s, on_expert_loss, priority, cache_salt
        )
        with self._session.unknown_model_forgotten():
            while not attempts.all_finished():
                try:
                    yield from self._stream(attempts)
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        self._wait(self._session.retry_delay_s(attempts, error), error)
            attempts.succeeded()

    def _stream(self, attempts: Attempts) -> Iterator[Reply]:
        """Yield the pieces of one attempt; raises unless the end of every choice comes."""
        call = attempts.start(self._session.generate_stream)
        try:
            while (message := self._call(lambda: next(call, None))) is not None:
                yield attempts.piece(message)
        finally:
            call.cancel()
        attempts.check_finished()

    def predict(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        outputs: Sequence[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> Prediction:
        """Return a mixture's outputs for the rows of ``inputs``, arrays [P, *shape] by name.

        The dtypes are the inputs' own; :meth:`mixture_info` tells them. ``outputs`` are the names
        of the wanted outputs; by default all. ``on_expert_loss`` is as in :meth:`generate`. A
        prediction is retried as ``generate`` is. Raises :class:`ExpertMeshError`, and
        :class:`UnreachableError` when no server answers.
        """
        session = self._session
        attempts = session.prediction_attempts(model, inputs, outputs, timeout_s, on_expert_loss)
        while True:
            try:
                answer = self._call(lambda: attempts.start(session.infer))
            except ExpertMeshError as error:
                self._wait(session.retry_delay_s(attempts, error), error)
            else:
                return attempts.whole(answer)

    def mixture_info(self, model: str) -> MixtureInfo:
        """Return the description of a served mixture."""
        return self._ask(self._session.mixture_info(model))

    def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return the description of one model, or of all served models where none is named."""
        return self._ask(self._session.model_info(model))

    def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Message] = (), model: str = ""
    ) -> tuple[int, ...]:
        """Return the token ids of a prompt, or of messages as the model's template renders them.

        Raises :class:`ExpertMeshError`.
        """
        model = model or self._first_model()
        return self._ask(self._session.tokenize(prompt, messages, model))

    def detokenize(self, token_ids: Sequence[int], model: str = "") -> str:
        """Return the text of token ids, special ones by their names; raises as :meth:`tokenize`."""
        return self._ask(self._session.detokenize(token_ids, model or self._first_model()))

    def tokens(self, token_ids: Sequence[int], model: str = "") -> tuple[Token, ...]:
        """Return the single tokens of ids, with their texts; raises as :meth:`tokenize`."""
        return self._ask(self._session.tokens(token_ids, model or self._first_model()))

    def _ask(self, call: Call[Answer]) -> Answer:
        return call.read(self._call(call.start, call.address))

    def _call(self, start: Callable[[], Any], address: str = "") -> Any:
        try:
            answer = start()
        except grpc.RpcError as error:
            raise self._session.failed(error, address) from None
        self._session.was_reached = True
        return answer

    def _wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """Wait for the next attempt; raises ``error`` if the client is closed before."""
        if self._closed.wait(delay_s):
            raise error

    def _first_model(self) -> str:
        # Remembered, since asking before each request would double the round trips.
        if not self._session.first_model:
            self._session.first_model = first_model(self.model_info()).id
        return self._session.first_model
