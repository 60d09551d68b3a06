"""The asynchronous client: the methods of :class:`router.client.Client` as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import ExpertMeshError
from router.client.admin import AsyncAdminClient
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
from router.client.types import (
    Message,
    MixtureInfo,
    ModelInfo,
    Prediction,
    Reply,
    Sampling,
    Token,
    UnreachableError,
)
from router.client.wire import CHANNEL_OPTIONS, first_model
from router.retry import RetryPolicy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class AsyncClient(AsyncAdminClient):
    """Talks to one gateway address from one event loop, the loop in which the client is made.

    It is an asynchronous context manager. The options are as in :class:`router.client.Client`.
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
        open_channel = channel_opener(grpc.aio, tls, CHANNEL_OPTIONS)
        self._session = Session(open_channel, address, retry, api_key, admin_address)
        self._closed = asyncio.Event()

    async def __aenter__(self) -> AsyncClient:
        """Return the client itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way raise :class:`UnreachableError`."""
        self._closed.set()
        for channel in self._session.channels:
            await channel.close()

    async def generate(
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
        """Return all choices of a prompt or of messages; see :meth:`router.client.Client.generate`.

        A cancelled task's request is cancelled at the server.
        """
        model = model or await self._first_model()
        attempts = self._session.attempts(
            prompt, messages, sampling, model, timeout_s, on_expert_loss, priority, cache_salt
        )
        with self._session.unknown_model_forgotten():
            while True:
                try:
                    answer = await self._call(attempts.start(self._session.generate))
                except ExpertMeshError as error:
                    await self._wait(self._session.retry_delay_s(attempts, error), error)
                else:
                    return attempts.whole(answer)

    async def stream(
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
    ) -> AsyncGenerator[Reply, None]:
        """Yield pieces of all choices as they come; see :meth:`router.client.Client.stream`.

        Closing the generator (``contextlib.aclosing``) cancels the request. Leaving the loop alone
        cancels it only once Python finalises the generator.
        """
        model = model or await self._first_model()
        attempts = self._session.attempts(
            prompt, messages, sampling, model, timeout_s, on_expert_loss, priority, cache_salt
        )
        with self._session.unknown_model_forgotten():
            while not attempts.all_finished():
                try:
                    async with aclosing(self._stream(attempts)) as replies:
                        async for reply in replies:
                            yield reply
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        await self._wait(self._session.retry_delay_s(attempts, error), error)
            attempts.succeeded()

    async def _stream(self, attempts: Attempts) -> AsyncGenerator[Reply, None]:
        """Yield the pieces of one attempt; raises unless the end of every choice comes."""
        call = attempts.start(self._session.generate_stream)
        try:
            while (message := await self._call(call.read())) is not grpc.aio.EOF:
                yield attempts.piece(message)
        finally:
            call.cancel()
        attempts.check_finished()

    async def predict(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        outputs: Sequence[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> Prediction:
        """Return a mixture's outputs; see :meth:`router.client.Client.predict`.

        A cancelled task's request is cancelled at the server.
        """
        session = self._session
        attempts = session.prediction_attempts(model, inputs, outputs, timeout_s, on_expert_loss)
        while True:
            try:
                answer = await self._call(attempts.start(session.infer))
            except ExpertMeshError as error:
                await self._wait(session.retry_delay_s(attempts, error), error)
            else:
                return attempts.whole(answer)

    async def mixture_info(self, model: str) -> MixtureInfo:
        """Return the description of a served mixture."""
        return await self._ask(self._session.mixture_info(model))

    async def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return the description of one model, or of all served models where none is named."""
        return await self._ask(self._session.model_info(model))

    async def tokenize(
        self, prompt: str | None = None, *, messages: Sequence[Message] = (), model: str = ""
    ) -> tuple[int, ...]:
        """Return token ids; see :meth:`router.client.Client.tokenize`."""
        model = model or await self._first_model()
        return await self._ask(self._session.tokenize(prompt, messages, model))

    async def detokenize(self, token_ids: Sequence[int], model: str = "") -> str:
        """Return the text of token ids; see :meth:`router.client.Client.detokenize`."""
        model = model or await self._first_model()
        return await self._ask(self._session.detokenize(token_ids, model))

    async def tokens(self, token_ids: Sequence[int], model: str = "") -> tuple[Token, ...]:
        """Return the single tokens of ids; see :meth:`router.client.Client.tokens`."""
        model = model or await self._first_model()
        return await self._ask(self._session.tokens(token_ids, model))

    async def _ask(self, call: Call[Answer]) -> Answer:
        return call.read(await self._call(call.start(), call.address))

    async def _call(self, answering: Awaitable[Any], address: str = "") -> Any:
        try:
            answer = await answering
        except grpc.RpcError as error:
            raise self._session.failed(error, address) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Closing the client cancels its calls, but the caller's task is not cancelled.
            if self._closed.is_set() and task is not None and not task.cancelling():
                raise UnreachableError("the client is closed") from None
            raise
        self._session.was_reached = True
        return answer

    async def _wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """Wait for the next attempt; raises ``error`` if the client is closed before."""
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
        except TimeoutError:
            return
        raise error

    async def _first_model(self) -> str:
        if not self._session.first_model:
            self._session.first_model = first_model(await self.model_info()).id
        return self._session.first_model
