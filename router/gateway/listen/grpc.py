"""A gateway's gRPC port, which the gateways of its machine share by ``SO_REUSEPORT``.

grpcio opens its own sockets. The system gives each new connection to one of them, and to another
one as soon as a gateway has ended.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import psutil
from grpc_reflection.v1alpha import reflection

from cluster.errors import ConfigError, ExpertMeshError
from router.config.listen import ListenConfig
from router.gateway.grpc.call import Method, abort
from router.observability.tracing import continue_trace
from router.security.access import FIELD, Access
from router.security.certificates import Certificates
from router.security.keys import Caller

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]
SETTLE_S = 0.3
"""How long handshakes with clients take at most; clients send a lost SYN again after 1 s."""
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of Linux
# Of a TCP segment, byte 13 has the flags, and 2 is SYN: keep nothing of it. All of any other.
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_QUEUED_AT = 24  # tcpi_unacked of tcp_info: of a listening socket, how many wait to be accepted
_POLL_S = 0.02
MAX_STREAMS = 1024
"""Calls of one connection at one time."""
MAX_PENDING = 16 * MAX_STREAMS
"""Calls that grpcio has not taken yet. Beyond 1,000 of its own it cancels some at random."""
AGE_S = 30.0
"""A connection takes no more calls after so long, give or take a tenth: it says GOAWAY, and its
client opens another one by itself. So clients leave a gateway that ends, and find new ones."""
QUIET_S, HANDOVER_QUIET_S = 0.02, 0.5
"""Calls that have come are taken within the first. A stop waits for such a pause, and a handover
for one in which clients that call now and then are not likely to call."""
TAKE_S = 5.0


class Door(grpc.aio.ServerInterceptor):
    """Answers calls of ``methods``, by their paths, that ``access`` admits by their metadata.

    grpcio reads a unary call's message before it calls the method. So a call that is refused gets a
    handler of a stream of requests, which reads none: what a stranger sends stays in the network.
    """

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


def listening_on(port: int) -> set[int]:
    """Return the descriptors with which this process listens on a port."""
    opened = psutil.Process().net_connections("tcp")
    return {one.fd for one in opened if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


async def leave(descriptors: Collection[int], timeout_s: float) -> None:
    """Close the listening sockets of ``descriptors``, once nothing waits there.

    grpcio itself would close them with the connections that it has not accepted, and the system
    resets these. So a socket gets no new ones first, and is then closed in grpcio's place.

    New connections go to the other processes that share the port, some after a second. Those that
    are open stay. What still waits after ``timeout_s`` is reset.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + timeout_s
    with ExitStack() as stack:
        found = {
            number: stack.enter_context(socket.socket(fileno=os.dup(number)))
            for number in descriptors
        }
        for one in found.values():
            _refuse_syns(one)
        await asyncio.sleep(min(timeout_s, SETTLE_S))
        while any(_queued(one) for one in found.values()) and loop.time() < until_s:
            await asyncio.sleep(_POLL_S)
        # grpcio goes on to use its number, and would write an error if it were no socket's.
        with socket.socket() as unused:
            for number in found:
                os.dup2(unused.fileno(), number, inheritable=False)


def _refuse_syns(listening: socket.socket) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_SYN)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(held))
    with suppress(OSError):  # Where the system has no filters, what comes now may be reset.
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def _queued(listening: socket.socket) -> int:
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUED_AT + 4)
    return int(struct.unpack_from("I", info, _QUEUED_AT)[0])


class GrpcListener:
    """Serves the methods behind a door on one address."""

    def __init__(
        self,
        door: Door,
        described: Sequence[str],
        limits: ListenConfig,
        max_message_bytes: int,
        certificates: Certificates | None,
    ) -> None:
        """Open nothing yet. With ``certificates`` it has TLS.

        It describes the ``described`` services (reflection). A longer message than
        ``max_message_bytes`` ends its call with RESOURCE_EXHAUSTED. Handlers refuse by a typed
        error, so their own limit is lower.
        """
        self._door, self._certificates = door, certificates
        self._descriptors: set[int] = set()
        self._server = grpc.aio.server(
            interceptors=[door],
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.server.max_pending_requests", MAX_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
                ("grpc.max_allowed_incoming_connections", limits.max_connections),
                ("grpc.server_handshake_timeout_ms", int(1000 * limits.head_timeout_s)),
                ("grpc.max_connection_age_ms", int(1000 * AGE_S)),
                # A refused call's message stays in the network, beyond 64 KiB.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", 65_535),
            ],
        )
        if described:
            names = (*described, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int, where: str) -> None:
        """Answer on a numeric address from now on; ``where`` is the port's key.

        Raises :class:`ConfigError` where grpcio cannot listen there.
        """
        others = listening_on(port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError(f"gRPC cannot listen on port {port} ({error})", where) from None
        await self._server.start()
        self._descriptors = listening_on(port) - others

    async def stop(self, grace_s: float, *, hands_over: bool = False) -> None:
        """Refuse new calls, and end those under way after ``grace_s``.

        Where it ``hands_over``, other gateways have the port: new connections go to them at once,
        and open ones before anything is refused, at the latest at the end of their age.
        """
        if hands_over:
            await leave(self._descriptors, TAKE_S)
            await self._wait_for_pause(HANDOVER_QUIET_S, 1.1 * AGE_S + TAKE_S)
        elif grace_s:
            await self._wait_for_pause(QUIET_S, min(grace_s, TAKE_S))
        await self._server.stop(grace_s)

    async def _wait_for_pause(self, quiet_s: float, timeout_s: float) -> None:
        """Return when no call has come for ``quiet_s``.

        grpcio takes one call after the other, and its stop cancels those that it has not taken:
        with a busy event loop nearly all that are under way.
        """
        until_s, taken = time.monotonic() + timeout_s, -1
        while taken != self._door.num_calls and time.monotonic() < until_s:
            taken = self._door.num_calls
            await asyncio.sleep(quiet_s)
