"""A gateway's own gRPC servers: for operators, and for clients where Serve has none.

Serve opens a gRPC port only where the ``grpc_options`` that it was started with name our services,
and starts none later. A file of ``applications`` alone names nothing, and ``serve run`` imports
nothing of ours before it has started Serve. The gateways then listen by themselves. On each machine
one gateway holds a port, and another takes it over when that gateway ends.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from router.gateway.grpc.handlers import ADMIN_SERVICE, SERVICES
from router.gateway.grpc.service import (
    GrpcMethods,
    add_admin_to_server,
    add_services_to_server,
)
from router.security.certificates import Certificates

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Surface:
    """What a server answers: its purpose, the registration of its services, and their names."""

    purpose: str
    add: Callable[[GrpcMethods, grpc.aio.Server], None]
    services: tuple[str, ...]


CLIENTS = Surface(
    "gRPC",
    add_services_to_server,
    (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name),
)
OPERATORS = Surface("gRPC for operators", add_admin_to_server, (ADMIN_SERVICE.full_name,))

logger = logging.getLogger("expertmesh.gateway")


class GrpcServer:
    """Serves a gateway's gRPC methods on a port of its machine, as soon as the port is free."""

    def __init__(
        self,
        servicer: GrpcMethods,
        surface: Surface,
        host: str,
        port: int,
        max_message_bytes: int,
        certificates: Certificates | None = None,
    ) -> None:
        """Open nothing yet; ``host`` may be ``0.0.0.0``. With ``certificates`` it has TLS.

        The server describes its services (reflection) where everybody may use them. A longer
        message than ``max_message_bytes`` ends its call with RESOURCE_EXHAUSTED. The servicer
        itself refuses with a typed error, so its own limit is lower.
        """
        self._servicer, self._surface = servicer, surface
        self._host, self._port, self._certificates = host, port, certificates
        self._options = [
            # Else gateways of two applications would get each other's calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
        ]
        self._server: grpc.aio.Server | None = None
        self._listening: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen from now on, or once the port is free; needs a running event loop.

        Logs why gRPC is not answered: the port is taken, or the server cannot start.
        """
        self._listening = asyncio.create_task(self._listen(), name="gRPC server")
        self._listening.add_done_callback(_log_failure)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, and end those under way after ``grace_s``."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace_s)

    async def wait_listening(self) -> None:
        """Return once the port is this gateway's; raises what kept the server from starting."""
        assert self._listening is not None, "start() comes first"
        await asyncio.shield(self._listening)

    async def _listen(self) -> None:
        host = f"[{self._host}]" if ":" in self._host else self._host
        address, is_logged = f"{host}:{self._port}", False
        self._server = server = grpc.aio.server(options=self._options)
        self._surface.add(self._servicer, server)
        if self._servicer.access.is_open:
            names = (*self._surface.services, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        while (reason := self._bind(server, address)) is not None:
            if not is_logged:
                logger.warning(
                    "%s: %s cannot be opened (%s), where another gateway of this machine or "
                    "another program listens; this gateway answers there once it is free",
                    self._surface.purpose,
                    address,
                    reason,
                )
                is_logged = True
            await asyncio.sleep(POLL_S)
        await server.start()
        is_news = is_logged or self._surface is CLIENTS  # operators are always answered here
        level = logging.INFO if is_news else logging.DEBUG
        logger.log(level, "%s: this gateway answers on %s", self._surface.purpose, address)

    def _bind(self, server: grpc.aio.Server, address: str) -> str | None:
        """Give a server its port; returns why the port cannot be had now, or ``None``.

        A socket tries first: each failure of gRPC's own writes a line of C++ to the terminal.
        """
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self._port))
            except OSError as error:
                return error.strerror or str(error)
        try:
            if self._certificates is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:  # taken since the socket tried
            return str(error)
        return None


def _log_failure(listening: asyncio.Task[None]) -> None:
    error = None if listening.cancelled() else listening.exception()
    if error is not None:
        logger.error("gRPC: the server cannot start", exc_info=error)
