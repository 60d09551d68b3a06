"""A gateway's gRPC port, which the gateways of its machine share by ``SO_REUSEPORT``.

grpcio opens its own sockets. The system gives each new connection to one of them, and to another
one as soon as a gateway has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
from grpc_reflection.v1alpha import reflection

from cluster.errors import ConfigError
from router.config.listen import ListenConfig
from router.gateway.listen.door import Door
from router.gateway.listen.leave import leave, listening_on
from router.security.certificates import Certificates

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
