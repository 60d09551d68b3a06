"""A client's connection: its channels, stubs and key, and how it waits for replies.

What both clients ask is in ``aio.py``, from which ``sync.py`` is generated.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import grpc

from cluster.errors import ExpertMeshError, UnknownModelError
from router.client.access import admin_address_of, key_metadata
from router.client.tls import ClientTls, channel_opener
from router.client.types import UnreachableError
from router.client.wire import CHANNEL_OPTIONS, typed_error, was_connected
from router.protos import admin_pb2_grpc, inference_pb2_grpc
from router.retry import Retries, RetryBudget, RetryPolicy

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_RETRY = RetryPolicy(first_delay_s=0.1, max_delay_s=2.0)


class Session:
    """The state that does not depend on how a client waits; nothing here waits."""

    _module: ModuleType
    """``grpc`` or ``grpc.aio``."""

    def __init__(
        self,
        address: str,
        retry: RetryPolicy | None,
        api_key: str | None,
        admin_address: str | None,
        tls: ClientTls | None,
    ) -> None:
        """Open no connection yet. Raises as :func:`key_metadata` and :func:`channel_opener` do."""
        open_channel = channel_opener(self._module, tls, CHANNEL_OPTIONS)
        admin_address = admin_address or admin_address_of(address)
        self._metadata = key_metadata(api_key)
        self._retry = retry
        self._budget = RetryBudget()
        self._address = address
        self._channels = (open_channel(address), open_channel(admin_address))
        self.inference = self._keyed(inference_pb2_grpc.InferenceStub(self._channels[0]))
        self.admin = self._keyed(admin_pb2_grpc.AdminStub(self._channels[1]))
        self.admin_place = f"{admin_address}, where gateways answer operators"
        self.first_model = ""
        self.was_reached = False
        """Whether a server has ever taken a call."""

    @cached_property
    def predictions(self) -> Any:
        """The stub of the Open Inference Protocol, made when it is first needed.

        Other packages have messages of the same names. protobuf takes these once, so a process
        that only generates text must be able to have both.
        """
        from router.client.prediction import stub_of

        return self._keyed(stub_of(self._channels[0]))

    def retries(self) -> Retries | None:
        """Return the retries of a new request, ``None`` without a policy."""
        return None if self._retry is None else Retries(self._retry, self._budget)

    @contextmanager
    def unknown_model_forgotten(self) -> Iterator[None]:
        """Forget the first model when the server no longer serves the requested model."""
        try:
            yield
        except UnknownModelError:
            self.first_model = ""
            raise

    def _keyed(self, stub: Any) -> Any:
        """Return a stub each of whose methods sends the client's key."""
        for name, method in vars(stub).items():
            setattr(stub, name, partial(method, metadata=self._metadata))
        return stub

    def _failed(self, error: Any, address: str) -> ExpertMeshError:
        """Return the typed error of a ``grpc.RpcError``; records whether a server took the call."""
        self.was_reached |= was_connected(error)
        return typed_error(error, address or self._address)


class AsyncSession(Session):
    """A connection of one event loop, the loop in which it is made."""

    _module = grpc.aio

    def __init__(self, *args: Any) -> None:
        """See :class:`Session`."""
        super().__init__(*args)
        self._closed = asyncio.Event()

    async def close(self) -> None:
        """Close the connection; calls in flight raise :class:`UnreachableError`."""
        self._closed.set()
        for channel in self._channels:
            await channel.close()

    async def answer(self, start: Callable[[], Awaitable[Any]], address: str = "") -> Any:
        """Return the reply of a call that ``start`` starts; raises :class:`ExpertMeshError`.

        ``address`` is where the call goes, for people; by default the client's own address.
        """
        try:
            reply = await start()
        except grpc.RpcError as error:
            raise self._failed(error, address) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Closing the client cancels its calls, but the caller's task is not cancelled.
            if self._closed.is_set() and task is not None and not task.cancelling():
                raise UnreachableError("the client is closed") from None
            raise
        self.was_reached = True
        return reply

    async def read(self, call: Any) -> Any:
        """Return a stream's next message, ``None`` after the last; raises as :meth:`answer`."""
        message = await self.answer(call.read)
        return None if message is grpc.aio.EOF else message

    async def wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """Wait for the next attempt; raises ``error`` if the client is closed before."""
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
        except TimeoutError:
            return
        raise error


class SyncSession(Session):
    """A connection whose waits block the calling thread; safe to use from several threads."""

    _module = grpc

    def __init__(self, *args: Any) -> None:
        """See :class:`Session`."""
        super().__init__(*args)
        self._closed = threading.Event()

    def close(self) -> None:
        """See :meth:`AsyncSession.close`."""
        self._closed.set()
        for channel in self._channels:
            channel.close()

    def answer(self, start: Callable[[], Any], address: str = "") -> Any:
        """See :meth:`AsyncSession.answer`."""
        try:
            reply = start()
        except grpc.RpcError as error:
            raise self._failed(error, address) from None
        self.was_reached = True
        return reply

    def read(self, call: Any) -> Any:
        """See :meth:`AsyncSession.read`."""
        return self.answer(lambda: next(call, None))

    def wait(self, delay_s: float, error: ExpertMeshError) -> None:
        """See :meth:`AsyncSession.wait`."""
        if self._closed.wait(delay_s):
            raise error
