"""One gRPC call: who may make it, how its message is read, and how errors become statuses.

A method gets the request as raw bytes, so bytes that are no protobuf are INVALID_ARGUMENT; grpcio
itself answers UNKNOWN. Who the caller is has been found out before
(:mod:`router.gateway.listen.grpc`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from cluster.errors import ExpertMeshError, InvalidRequestError
from router.gateway.errors import public_error
from router.gateway.limits.room import arrival_timeout
from router.protos.errors import DETAILS_KEY, grpc_error
from router.security.keys import Caller, Role

logger = logging.getLogger(__name__)

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


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())
