"""The client on asyncio: all that :class:`router.client.Client` does, in the same words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from cluster.errors import ExpertMeshError, UnavailableError
from cluster.reports import ChangeReport, ClusterStatus, LoadStatus, RebalanceReport
from router.client.attempts import Attempts
from router.client.session import (
    CHANGE_TIMEOUT_S,
    DEFAULT_ADDRESS,
    DEFAULT_RETRY,
    DEFAULT_TIMEOUT_S,
    INFO_TIMEOUT_S,
    Session,
)
from router.client.types import Message, ModelInfo, Reply, Sampling, UnreachableError
from router.client.wire import (
    CHANNEL_OPTIONS,
    call_options,
    change_of,
    choices_of,
    load_of,
    models_of,
    rebalance_of,
    reply_of,
    status_of,
)
from router.protos import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.retry import RetryPolicy


class AsyncClient:
    """Talks to one gateway address from one event loop, the one in which it is made.

    An asynchronous context manager. ``retry`` is as in :class:`router.client.Client`.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, retry: RetryPolicy | None = DEFAULT_RETRY
    ) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._session = Session(address, retry)
        self._closed = asyncio.Event()
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        """Return the client itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way raise :class:`UnreachableError`."""
        self._closed.set()
        await self._channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> list[Reply]:
        """Return all choices of a prompt or of messages; see :meth:`router.client.Client.generate`.

        A cancelled task's request is cancelled at the server.
        """
        model = model or await self._first_model()
        request = self._session.request(
            prompt, messages, sampling, model, timeout_s, on_expert_loss
        )
        attempts = self._session.attempts(request, timeout_s)
        with self._session.unknown_model_forgotten():
            while True:
                try:
                    options = call_options(attempts)
                    answer = await self._call(
                        self._inference.Generate(attempts.request(), **options)
                    )
                except ExpertMeshError as error:
                    await self._wait(attempts.failed(error), error)
                else:
                    attempts.succeeded()
                    return choices_of(answer)

    async def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        *,
        messages: Sequence[Message] = (),
        model: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_expert_loss: str | None = None,
    ) -> AsyncGenerator[Reply, None]:
        """Yield pieces of all choices as they come; see :meth:`router.client.Client.stream`.

        Closing the generator (``contextlib.aclosing``) cancels the request; one that is only left
        is closed when Python finds nobody holding it.
        """
        model = model or await self._first_model()
        request = self._session.request(
            prompt, messages, sampling, model, timeout_s, on_expert_loss
        )
        attempts = self._session.attempts(request, timeout_s)
        with self._session.unknown_model_forgotten():
            while not attempts.all_finished():
                try:
                    async with aclosing(self._stream(attempts)) as replies:
                        async for reply in replies:
                            yield reply
                except ExpertMeshError as error:
                    if not attempts.all_finished():  # else nothing is missing
                        await self._wait(attempts.failed(error), error)
            attempts.succeeded()

    async def _stream(self, attempts: Attempts) -> AsyncGenerator[Reply, None]:
        """Yield what one attempt brings; raises unless it brings the end of every choice."""
        call = self._inference.GenerateStream(attempts.request(), **call_options(attempts))
        try:
            while (message := await self._call(call.read())) is not grpc.aio.EOF:
                reply = reply_of(message)
                attempts.took(reply.index, reply.token_ids, reply.finish_reason, reply.exact)
                yield reply
        finally:
            call.cancel()
        if not attempts.all_finished():
            raise UnavailableError("the stream ended before its last token")

    async def _wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """Wait; raises ``error`` where there never was a server or the client is closed."""
        if not self._session.was_reached:
            raise error
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
        except TimeoutError:
            return
        raise error

    async def model_info(self, model: str = "") -> list[ModelInfo]:
        """Return one model's numbers, or those of all served models when none is named."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        return models_of(
            await self._call(self._inference.GetModelInfo(request, timeout=INFO_TIMEOUT_S))
        )

    async def status(self) -> ClusterStatus:
        """Return what the controller knows of the cluster."""
        request = admin_pb2.GetStatusRequest()
        return status_of(await self._call(self._admin.GetStatus(request, timeout=INFO_TIMEOUT_S)))

    async def load(self) -> LoadStatus:
        """Return the load of experts and devices lately, and the last rebalancings."""
        request = admin_pb2.GetLoadRequest()
        return load_of(await self._call(self._admin.GetLoad(request, timeout=INFO_TIMEOUT_S)))

    async def rebalance(self, dry_run: bool = False) -> RebalanceReport:
        """Have copies of experts follow the load, or with ``dry_run`` only be told how."""
        request = admin_pb2.RebalanceRequest(dry_run=dry_run)
        call = self._admin.Rebalance(request, timeout=CHANGE_TIMEOUT_S)
        return rebalance_of(await self._call(call))

    async def scale(self, actors: int, pool: str = "", dry_run: bool = False) -> ChangeReport:
        """Have a pool of so many actors, or with ``dry_run`` only be told what that would move.

        Returns when experts are spread over them, or while Ray finds no device for one. Raises
        :class:`InvalidRequestError` where the number is out of bounds or experts do not fit.
        """
        request = admin_pb2.ScaleRequest(actors=actors, pool=pool, dry_run=dry_run)
        call = self._admin.Scale(request, timeout=CHANGE_TIMEOUT_S)
        return change_of(await self._call(call))

    async def drain(self, target: str, dry_run: bool = False) -> ChangeReport:
        """Empty and end an actor, or those of a node (its id, or the first characters of it).

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.DrainRequest(target=target, dry_run=dry_run)
        call = self._admin.Drain(request, timeout=CHANGE_TIMEOUT_S)
        return change_of(await self._call(call))

    async def set_copies(
        self, model: str, layer: int, expert: int, copies: int, dry_run: bool = False
    ) -> ChangeReport:
        """Bring one expert to so many copies, until a rebalancing finds others better.

        Raises as :meth:`scale` does.
        """
        request = admin_pb2.SetCopiesRequest(
            model=model, layer=layer, expert=expert, copies=copies, dry_run=dry_run
        )
        call = self._admin.SetCopies(request, timeout=CHANGE_TIMEOUT_S)
        return change_of(await self._call(call))

    async def _call(self, work: Awaitable[Any]) -> Any:
        try:
            answer = await work
        except grpc.RpcError as error:
            raise self._session.failed(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # A closed channel cancels its calls, which is no reason for the task to end.
            if self._closed.is_set() and task is not None and not task.cancelling():
                raise UnreachableError("the client is closed") from None
            raise
        self._session.was_reached = True
        return answer

    async def _first_model(self) -> str:
        if not self._session.first_model:
            self._session.first_model = (await self.model_info())[0].id
        return self._session.first_model
