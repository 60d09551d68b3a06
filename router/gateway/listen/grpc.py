"""A gateway's gRPC port, which the gateways of its machine share by ``SO_REUSEPORT``.

grpcio opens its own sockets. The system gives each new connection to one of them, and to another
one as soon as a gateway has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from grpc_reflection.v1alpha import reflection

from cluster.errors import ConfigError
from router.gateway.listen.door import Door
from router.listen_config import ListenConfig
from router.security.certificates import Certificates

MAX_STREAMS = 1024
"""Calls of one connection at one time."""
MAX_PENDING = 16 * MAX_STREAMS
"""Calls that grpcio has not taken yet. Beyond 1,000 of its own it cancels some at random."""
QUIET_S, TAKE_S = 0.02, 5.0
"""Calls that have come are taken within the first. A stop waits for such a pause."""
IDLE_S = 300.0
"""A connection without a call for so long is closed; its client opens another one by itself."""


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
                ("grpc.max_connection_idle_ms", int(1000 * IDLE_S)),
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
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError(f"given {port}: gRPC cannot listen on it ({error})", where) from None
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and end those under way after ``grace_s``."""
        if grace_s:
            await self._take_calls(min(grace_s, TAKE_S))
        await self._server.stop(grace_s)

    async def _take_calls(self, timeout_s: float) -> None:
        """Return at a moment at which grpcio has taken all calls that have come.

        It takes one after the other, and its stop cancels those that it has not taken: with a busy
        event loop nearly all that are under way. Where clients leave no pause, some are cancelled.
        """
        loop = asyncio.get_running_loop()
        until_s, taken = loop.time() + timeout_s, -1
        while taken != self._door.num_calls and loop.time() < until_s:
            taken = self._door.num_calls
            await asyncio.sleep(QUIET_S)
