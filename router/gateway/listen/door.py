"""Judges a gRPC call by its metadata, before a message of it is read.

grpcio reads a unary call's message before it calls the method. So a call that is refused gets a
handler of a stream of requests, which reads none: what a stranger sends stays in the network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from cluster.errors import ExpertMeshError
from router.gateway.grpc.methods import Method, abort
from router.observability.tracing import continue_trace
from router.security.access import FIELD, Access
from router.security.keys import Caller

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class Door(grpc.aio.ServerInterceptor):
    """Answers calls of ``methods``, by their paths, that ``access`` admits."""

    def __init__(self, access: Access, methods: Mapping[str, Method], max_body_bytes: int) -> None:
        """Other calls are passed on, to be answered as calls of no method.

        A message has as long to come as ``max_body_bytes`` may take.
        """
        self._access, self._methods, self._max_body_bytes = access, methods, max_body_bytes
        self.num_calls = 0
        """How many calls grpcio has taken."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call; grpcio awaits this at the call's head."""
        self.num_calls += 1
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return await continuation(handler_call_details)
        try:
            caller = await self._caller(method, handler_call_details.invocation_metadata)
        except ExpertMeshError as error:
            return _refusal(error)
        return method.handler(caller, self._max_body_bytes)

    async def _caller(self, method: Method, metadata: Any) -> Caller | None:
        values = [value for key, value in metadata or () if key == FIELD]
        given = [value if isinstance(value, str) else "" for value in values]
        if method.is_open and not given and not self._access.is_open:
            return None
        caller = await self._access.admit("grpc", given, method.role)
        if method.charge is not None:
            method.charge(caller)
            continue_trace({key: value for key, value in metadata if isinstance(value, str)})
        return caller


def _refusal(error: ExpertMeshError) -> grpc.RpcMethodHandler:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(error, context)

    return grpc.stream_unary_rpc_method_handler(refuse)
