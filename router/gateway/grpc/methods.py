"""The methods of a gateway's gRPC services: who may call each, and how errors become statuses.

A method gets the request as raw bytes, so bytes that are no protobuf are INVALID_ARGUMENT; grpcio
itself answers UNKNOWN. Who the caller is has been found out before
(:mod:`router.gateway.listen.door`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from cluster.errors import ExpertMeshError, InvalidRequestError, OverloadedError
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
from router.gateway.limits.room import arrival_timeout
from router.gateway.predict.v2_grpc import PREDICTION_SERVICE, PredictionHandlers
from router.protos.errors import DETAILS_KEY, grpc_error
from router.security.keys import Caller, Role

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 0.5
_MAX_WATCH_S = 60.0
"""A gateway that a redeploy has replaced ends with its last stream. A client that goes on watching
calls again, and reaches the new gateway."""
_MAX_WATCHES = 256
"""Calls of ``Health/Watch`` in one gateway; they have no place among its requests."""
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]

Context = Any
"""A ``grpc.aio.ServicerContext``; its stubs have no type for the messages."""
Unary = Callable[[bytes, Any, Context], Awaitable[Any]]
Stream = Callable[[bytes, Any, Context], AsyncGenerator[Any, None]]
"""Both get the request, its :class:`Caller` (``None`` for an open method's without a key)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method, and the role that its callers need; without one any key will do.

    An open method also answers callers without a key. ``charge`` is called with the caller before
    the request is read, and may refuse by :class:`OverloadedError`.
    """

    role: Role | None
    answer: Unary | Stream
    is_stream: bool = False
    is_open: bool = False
    charge: Callable[[Caller], None] | None = None

    def handler(self, caller: Caller | None, max_body_bytes: int) -> grpc.RpcMethodHandler:
        """Return what answers one call of ``caller``.

        For grpcio its request is a stream, so that the message is read here. It has as long to come
        as ``max_body_bytes`` may take.
        """
        if self.is_stream:
            write = partial(_write_answers, self.answer, caller, max_body_bytes)
            return grpc.stream_stream_rpc_method_handler(write, None, _serialize)
        answer = partial(_answer, self.answer, caller, max_body_bytes)
        return grpc.stream_unary_rpc_method_handler(answer, None, _serialize)


class GrpcMethods:
    """The methods of all services, by their paths."""

    def __init__(self, inference: GrpcHandlers, predictions: PredictionHandlers) -> None:
        self._inference, self._predictions = inference, predictions
        self._watches = 0

    def for_clients(self) -> dict[str, Method]:
        """Return the methods for inference and health."""
        charged = partial(Method, Role.INFERENCE, charge=self._inference.service.charges.begin)
        inference = {
            "Generate": charged(self._generate),
            "GenerateStream": charged(self._generate_stream, is_stream=True),
            "GetModelInfo": Method(Role.INFERENCE, _without_caller(self._inference.get_model_info)),
            "Tokenize": charged(_without_caller(self._inference.tokenize)),
            "Detokenize": charged(_without_caller(self._inference.detokenize)),
        }
        predictions = {
            name: Method(Role.INFERENCE, partial(self._predict, name))
            for name in PREDICTION_SERVICE.methods_by_name
        } | {"ModelInfer": charged(partial(self._predict, "ModelInfer"))}
        health = {
            "Check": Method(None, self._check, is_open=True),
            "Watch": Method(None, self._watch, is_stream=True),
        }
        return {
            **_by_path(INFERENCE_SERVICE, inference),
            **_by_path(PREDICTION_SERVICE, predictions),
            **_by_path(HEALTH_SERVICE, health),
        }

    def for_operators(self) -> dict[str, Method]:
        """Return the methods of the Admin service."""
        calls = {name: Method(Role.ADMIN, partial(self._administer, name)) for name in ADMIN_CALLS}
        return _by_path(ADMIN_SERVICE, calls)

    async def _generate(self, request: bytes, caller: Caller, context: Context) -> Any:
        reply = await self._inference.generate(request, caller)
        _set_exact(all(choice.exact for choice in (reply, *reply.other_choices)), context)
        return reply

    async def _generate_stream(
        self, request: bytes, caller: Caller, context: Context
    ) -> AsyncGenerator[Any, None]:
        is_exact = True
        async with aclosing(self._inference.generate_stream(request, caller)) as replies:
            async for reply in replies:
                is_exact = is_exact and reply.exact
                _set_exact(is_exact, context)
                yield reply

    async def _predict(self, name: str, request: bytes, caller: Caller, context: Context) -> Any:
        reply = await self._predictions.answer(name, request, caller)
        if name == "ModelInfer":
            _set_exact(reply.parameters["exact"].bool_param, context)
        return reply

    async def _administer(
        self, name: str, request: bytes, caller: Caller | None, context: Context
    ) -> Any:
        return await self._inference.administer(name, request)

    async def _check(self, request: bytes, caller: Caller | None, context: Context) -> Any:
        """Answer ``Health/Check``; only a caller with a key gets the metadata."""
        if caller is not None:
            context.set_trailing_metadata(self._inference.health_metadata())
        return await self._inference.check_health(request)

    async def _watch(
        self, request: bytes, caller: Caller | None, context: Context
    ) -> AsyncGenerator[Any, None]:
        name = parse_health_check(request)
        if self._watches >= _MAX_WATCHES:
            raise OverloadedError(
                f"this gateway already has {_MAX_WATCHES} open watches; use Health/Check",
                "",
                _MAX_WATCH_S,
            )
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
        while time.monotonic() < until_s and not self._inference.service.ready().is_deleted:
            reply = self._inference.health()
            if name and name not in SERVICES:
                reply = health_pb2.HealthCheckResponse(
                    status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                )
            if reply.status != sent:
                sent = reply.status
                yield reply
            await asyncio.sleep(_WATCH_PERIOD_S)


def _by_path(service: Any, methods: dict[str, Method]) -> dict[str, Method]:
    if set(methods) != set(service.methods_by_name.keys()):
        raise ValueError(f"{service.full_name} has other methods than {', '.join(methods)}")
    return {f"/{service.full_name}/{name}": method for name, method in methods.items()}


def _without_caller(handler: Callable[[bytes], Awaitable[Any]]) -> Unary:
    async def answer(request: bytes, caller: Caller | None, context: Context) -> Any:
        return await handler(request)

    return answer


async def _answer(
    method: Any, caller: Caller | None, max_body_bytes: int, requests: Any, context: Context
) -> Any:
    try:
        return await method(await _read(context, max_body_bytes), caller, context)
    except Exception as error:
        await abort(error, context)


async def _write_answers(
    method: Any, caller: Caller | None, max_body_bytes: int, requests: Any, context: Context
) -> None:
    # Writes the messages itself, to notice a client that leaves while a message is sent.
    try:
        request = await _read(context, max_body_bytes)
        async with aclosing(method(request, caller, context)) as replies:
            async for reply in replies:
                await context.write(reply)
    except Exception as error:
        await abort(error, context)


async def _read(context: Context, max_body_bytes: int) -> bytes:
    # Its length is not known before it is there, so the time of the longest counts.
    async with arrival_timeout("message", max_body_bytes):
        message = await context.read()
    if message is grpc.aio.EOF:
        raise InvalidRequestError("the call has no message")
    return bytes(message)


async def abort(error: Exception, context: Context) -> None:
    """End a call with an error's status; raises what grpcio ends the call by."""
    if not isinstance(error, ExpertMeshError):
        logger.error("a gRPC call failed", exc_info=error)
    code, words, details = grpc_error(public_error(error))
    await context.abort(code, words, ((DETAILS_KEY, details),))


def _set_exact(is_exact: bool, context: Context) -> None:
    context.set_trailing_metadata([(EXACT_KEY, str(is_exact).lower())])


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())
