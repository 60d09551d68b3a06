"""Registers the gRPC methods with a server, and turns errors into statuses.

Serve's proxy calls :func:`add_services_to_server` (named in the YAML's ``grpc_servicer_functions``)
and sends each call to the gateway's method of the same name; see :class:`GrpcMethods`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from cluster.errors import ExpertMeshError, OverloadedError
from cluster.spec import EXACT_KEY
from router.gateway.errors import public_error
from router.gateway.grpc.handlers import (
    ADMIN_CALLS,
    ADMIN_SERVICE,
    INFERENCE_SERVICE,
    SERVICES,
    GrpcHandlers,
    parse_health_check,
)
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE, PredictionHandlers
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, grpc_error
from router.security.access import FIELD, Access
from router.security.keys import Caller, Role

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 0.5
_MAX_WATCH_S = 60.0
"""A gateway that a redeploy has replaced ends with its last stream. A client that goes on watching
calls again, and reaches the new gateway."""
_MAX_WATCHES = 256
"""Calls of ``Health/Watch`` in one gateway; they have no place among its requests."""
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]


class CallContext(Protocol):
    """The part of a gRPC call's context that is used; Serve's and grpcio's both have it."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Return the metadata that came with the call."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code."""

    def set_details(self, details: str) -> None:
        """Set the status message."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Set the metadata sent with the status."""


class _Handlers(grpc.GenericRpcHandler):
    """Handlers of all methods, by path.

    Serve replaces the entries of ``_method_handlers`` with calls to its replicas. From a replica to
    Serve's proxy a status travels only with a message, so the error of a stream comes with an empty
    message. That message is dropped here, so that the client sees the status alone.
    """

    def __init__(self, method_handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._method_handlers = method_handlers

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call, or ``None``; grpcio calls this."""
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None or not handler.response_streaming:
            return handler
        return handler._replace(unary_stream=_without_error_message(handler.unary_stream))


def _without_error_message(
    stream: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any], Awaitable[None]]:
    async def filtered(request: Any, context: Any) -> None:
        # Writes the messages itself, to notice a client that leaves while a message is sent.
        messages = stream(request, _ContextWithPeer(context))
        try:
            async for message in messages:
                if message != b"" and not context.code():  # only an error's message is empty
                    await context.write(message)
        except asyncio.CancelledError:
            await _cancel(messages)
            raise

    return filtered


class _ContextWithPeer:
    """A call's context that still knows its peer when the call is over.

    Serve asks for the peer once more after a cancelled stream, for its log. grpcio then reads freed
    memory, which has ended the whole proxy.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer: str = context.peer()

    def peer(self) -> str:
        """Return the address that the call came from."""
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


async def _cancel(messages: AsyncIterator[Any]) -> None:
    """Make Serve cancel a call whose client left while a message was sent to it.

    Serve does so only if the cancellation comes while it waits for the next message; otherwise the
    call runs to its end. Must be done before the handler returns: Serve reads the client's address
    afterwards, and grpcio crashes when asked for it later.
    """
    following = asyncio.ensure_future(anext(messages, None))
    await asyncio.sleep(0)  # lets Serve begin to wait
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def add_services_to_server(servicer: Any, server: Any) -> None:
    """Register the services for clients; their methods get the request as raw bytes.

    Bytes that are no protobuf thus reach :class:`GrpcMethods`, which answers INVALID_ARGUMENT;
    grpcio itself answers UNKNOWN.
    """
    for service in (INFERENCE_SERVICE, PREDICTION_SERVICE, _HEALTH_SERVICE):
        _add_service(service, servicer, server)


def add_admin_to_server(servicer: Any, server: Any) -> None:
    """Register the service for operators; see :func:`add_services_to_server`."""
    _add_service(ADMIN_SERVICE, servicer, server)


def _add_service(service: Any, servicer: Any, server: Any) -> None:
    handlers = {}
    for rpc in service.methods:
        method = getattr(servicer, rpc.name)
        handlers[f"/{service.full_name}/{rpc.name}"] = (
            grpc.unary_stream_rpc_method_handler(method, None, _serialize)
            if rpc.server_streaming
            else grpc.unary_unary_rpc_method_handler(method, None, _serialize)
        )
    server.add_generic_rpc_handlers((_Handlers(handlers),))


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


class GrpcMethods:
    """The methods of all services; Serve needs names that are unique over all services.

    A subclass sets ``grpc_handlers``, ``prediction_handlers`` and ``access``. Every method takes
    bytes, returns (or yields) protobuf messages and raises nothing but a cancellation: an error is
    a status in ``grpc_context``. The methods of Admin and GRPCInferenceService are added below the
    class.
    """

    grpc_handlers: GrpcHandlers
    prediction_handlers: PredictionHandlers
    access: Access
    _watches = 0

    async def Generate(self, request: bytes, grpc_context: CallContext) -> Any:  # noqa: N802
        """Serve ``Inference/Generate``."""
        empty = inference_pb2.GenerateReply
        work = partial(self.grpc_handlers.generate, request)
        reply = await self._unary(Role.INFERENCE, work, empty, grpc_context)
        if reply.finish_reason:  # an empty reply is an error, which has other metadata
            is_exact = all(choice.exact for choice in (reply, *reply.other_choices))
            _set_exact(is_exact, grpc_context)
        return reply

    async def GenerateStream(  # noqa: N802
        self, request: bytes, grpc_context: CallContext
    ) -> AsyncGenerator[Any, None]:
        """Serve ``Inference/GenerateStream``."""

        def replies(caller: Caller) -> AsyncGenerator[Any, None]:
            generated = self.grpc_handlers.generate_stream(request, caller)
            return _with_exact(generated, grpc_context)

        empty = inference_pb2.GenerateReply
        stream = self._stream(Role.INFERENCE, replies, empty, grpc_context)
        async with aclosing(stream) as safe:
            async for reply in safe:
                yield reply

    async def GetModelInfo(self, request: bytes, grpc_context: CallContext) -> Any:  # noqa: N802
        """Serve ``Inference/GetModelInfo``."""
        empty = inference_pb2.GetModelInfoReply

        async def work(caller: Caller) -> Any:
            return await self.grpc_handlers.get_model_info(request)

        return await self._unary(Role.INFERENCE, work, empty, grpc_context)

    async def Tokenize(self, request: bytes, grpc_context: CallContext) -> Any:  # noqa: N802
        """Serve ``Inference/Tokenize``."""

        async def work(caller: Caller) -> Any:
            return await self.grpc_handlers.tokenize(request)

        empty = inference_pb2.TokenizeReply
        return await self._unary(Role.INFERENCE, work, empty, grpc_context)

    async def Detokenize(self, request: bytes, grpc_context: CallContext) -> Any:  # noqa: N802
        """Serve ``Inference/Detokenize``."""

        async def work(caller: Caller) -> Any:
            return await self.grpc_handlers.detokenize(request)

        empty = inference_pb2.DetokenizeReply
        return await self._unary(Role.INFERENCE, work, empty, grpc_context)

    async def Check(self, request: bytes, grpc_context: CallContext) -> Any:  # noqa: N802
        """Serve ``Health/Check``; it needs no key, but only a key gets the metadata."""
        is_known = self.access.is_open or bool(_given(grpc_context))

        async def work(caller: Caller | None) -> Any:
            if is_known:
                grpc_context.set_trailing_metadata(self.grpc_handlers.health_metadata())
            return await self.grpc_handlers.check_health(request)

        empty = health_pb2.HealthCheckResponse
        if is_known:
            return await self._unary(None, work, empty, grpc_context)
        return await _answered(partial(work, None), empty, grpc_context)

    async def Watch(  # noqa: N802
        self, request: bytes, grpc_context: CallContext
    ) -> AsyncGenerator[Any, None]:
        """Serve ``Health/Watch``; any key will do."""

        def replies(caller: Caller) -> AsyncGenerator[Any, None]:
            return self._watch(request)

        empty = health_pb2.HealthCheckResponse
        async with aclosing(self._stream(None, replies, empty, grpc_context)) as safe:
            async for reply in safe:
                yield reply

    async def _unary(
        self,
        role: Role | None,
        work: Callable[[Caller], Awaitable[Any]],
        empty: Callable[[], Any],
        context: CallContext,
    ) -> Any:
        """Return the reply of ``work`` to a caller of this role, or an empty one with an error."""

        async def admitted() -> Any:
            return await work(await self.access.admit("grpc", _given(context), role))

        return await _answered(admitted, empty, context)

    async def _stream(
        self,
        role: Role | None,
        replies: Callable[[Caller], AsyncGenerator[Any, None]],
        empty: Callable[[], Any],
        context: CallContext,
    ) -> AsyncGenerator[Any, None]:
        """Yield replies to a caller of this role; an error is an empty one at the end."""
        try:
            caller = await self.access.admit("grpc", _given(context), role)
            async with aclosing(replies(caller)) as admitted:
                async for reply in admitted:
                    yield reply
        except Exception as error:
            _set_error(error, context)
            # Serve passes a status on only with a message; see _Handlers.
            yield empty()

    async def _watch(self, request: bytes) -> AsyncGenerator[Any, None]:
        name = parse_health_check(request)
        if self._watches >= _MAX_WATCHES:
            raise OverloadedError(f"{_MAX_WATCHES} calls watch already", "", _MAX_WATCH_S)
        self._watches += 1
        try:
            async with aclosing(self._changes_of_health(name)) as replies:
                async for reply in replies:
                    yield reply
        finally:
            self._watches -= 1

    async def _changes_of_health(self, name: str) -> AsyncGenerator[Any, None]:
        sent: int | None = None
        until_s = time.monotonic() + _MAX_WATCH_S
        while time.monotonic() < until_s and not self.grpc_handlers.service.ready().is_deleted:
            reply = self.grpc_handlers.health()
            if name and name not in SERVICES:
                reply = health_pb2.HealthCheckResponse(
                    status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
            if reply.status != sent:
                sent = reply.status
                yield reply
            await asyncio.sleep(_WATCH_PERIOD_S)


def _admin_method(name: str) -> Callable[[GrpcMethods, bytes, CallContext], Awaitable[Any]]:
    empty = GetMessageClass(ADMIN_SERVICE.methods_by_name[name].output_type)

    async def method(self: GrpcMethods, request: bytes, grpc_context: CallContext) -> Any:
        async def work(caller: Caller) -> Any:
            return await self.grpc_handlers.administer(name, request)

        return await self._unary(Role.ADMIN, work, empty, grpc_context)

    return method


for _name in ADMIN_CALLS:
    setattr(GrpcMethods, _name, _admin_method(_name))


def _prediction_method(name: str) -> Callable[[GrpcMethods, bytes, CallContext], Awaitable[Any]]:
    empty = GetMessageClass(PREDICTION_SERVICE.methods_by_name[name].output_type)

    async def method(self: GrpcMethods, request: bytes, grpc_context: CallContext) -> Any:
        work = partial(self.prediction_handlers.answer, name, request)
        reply = await self._unary(Role.INFERENCE, work, empty, grpc_context)
        if name == "ModelInfer" and reply.model_name:  # an error's empty reply has other metadata
            _set_exact(reply.parameters["exact"].bool_param, grpc_context)
        return reply

    return method


for _name in PREDICTION_SERVICE.methods_by_name:
    setattr(GrpcMethods, _name, _prediction_method(_name))


async def _answered(
    work: Callable[[], Awaitable[Any]], empty: Callable[[], Any], context: CallContext
) -> Any:
    try:
        return await work()
    except Exception as error:
        _set_error(error, context)
        return empty()


def _given(context: CallContext) -> list[str]:
    """Return the values of ``authorization`` in a call's metadata."""
    values = [value for key, value in context.invocation_metadata() or () if key == FIELD]
    return [value if isinstance(value, str) else "" for value in values]


async def _with_exact(
    replies: AsyncGenerator[Any, None], context: CallContext
) -> AsyncGenerator[Any, None]:
    """Set the metadata to whether all replies so far are exact; Serve sends it with each reply."""
    was_exact: bool | None = None
    async with aclosing(replies):
        async for reply in replies:
            is_exact = was_exact is not False and reply.exact
            if is_exact != was_exact:
                was_exact = is_exact
                _set_exact(is_exact, context)
            yield reply


def _set_exact(exact: bool, context: CallContext) -> None:
    context.set_trailing_metadata([(EXACT_KEY, str(exact).lower())])


def _set_error(error: Exception, context: CallContext) -> None:
    if not isinstance(error, ExpertMeshError):
        logger.error("a gRPC call failed", exc_info=error)
    code, details, status_details = grpc_error(public_error(error))
    context.set_code(code)
    context.set_details(details)
    metadata: Iterable[tuple[str, bytes]] = [(DETAILS_KEY, status_details)]
    context.set_trailing_metadata(metadata)
