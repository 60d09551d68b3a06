"""Judges a gRPC call by its metadata, before a message of it is read.

grpcio reads a unary call's message before it calls the method. So a call that is refused gets a
handler of a stream of requests, which reads none: what a stranger sends stays in the network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc

from cluster.errors import ExpertMeshError
from router.gateway.errors import public_error
from router.protos.errors import DETAILS_KEY, grpc_error
from router.security.access import FIELD, Access
from router.security.keys import Role

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class Door(grpc.aio.ServerInterceptor):
    """Lets calls pass that ``access`` admits."""

    def __init__(
        self, access: Access, roles: Mapping[str, Role | None], open_paths: Sequence[str]
    ) -> None:
        """``roles`` has the role that each method's path needs, ``None`` for any key.

        ``open_paths`` are the methods that need no key. A key that is given is judged there, too.
        A path that is neither is of no method, and is passed on to be answered as such.
        """
        self._access, self._roles, self._open = access, roles, frozenset(open_paths)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call; grpcio awaits this at the call's head."""
        path = handler_call_details.method
        given = keys_in(handler_call_details.invocation_metadata)
        if path in self._roles or (path in self._open and given):
            try:
                await self._access.admit("grpc", given, self._roles.get(path))
            except ExpertMeshError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def keys_in(metadata: Any) -> list[str]:
    """Return the values of ``authorization`` in a call's metadata; bytes count as an empty key."""
    values = [value for key, value in metadata or () if key == FIELD]
    return [value if isinstance(value, str) else "" for value in values]


def _refusal(error: ExpertMeshError) -> grpc.RpcMethodHandler:
    code, words, details = grpc_error(public_error(error))

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, words, ((DETAILS_KEY, details),))

    return grpc.stream_unary_rpc_method_handler(refuse)
