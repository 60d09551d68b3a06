"""All ports of a gateway: HTTP, gRPC, operators, and a probe's."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster.heap import give_back_freed
from router.config.listen import ListenConfig
from router.gateway.grpc.call import Method
from router.gateway.http_io import HEALTH_PATH, healthz
from router.gateway.listen.claim import Claim, claim, open_socket, resolved
from router.gateway.listen.grpc import Door, GrpcListener
from router.gateway.listen.http import HttpListener
from router.security.access import Access
from router.security.certificates import Certificates

SECTION = "gateway.listen"
MESSAGE_ROOM = 4
"""Messages of up to this many ``gateway.max_body_bytes`` are read, so that a limit is named."""
FREED_PERIOD_S, FREED_CONNECTIONS = 5.0, 500
"""How often is looked whether so many connections have ended, whose memory is given back then."""


@dataclass(frozen=True, slots=True)
class Surface:
    """What a gRPC port answers: methods by path, and the names of their services."""

    methods: Mapping[str, Method]
    services: tuple[str, ...]


class Listeners:
    """Opens a gateway's ports, and closes them behind the last request."""

    def __init__(
        self,
        listen: ListenConfig,
        app: ASGIApp,
        clients: Surface,
        operators: Surface,
        access: Access,
        max_body_bytes: int,
        certificates: Certificates | None,
    ) -> None:
        """Open nothing yet. gRPC describes its services where everybody may use them."""
        self._listen, self._app, self._certificates = listen, app, certificates
        self._claims: list[Claim] = []
        """Of the gRPC ports."""
        self._http: list[HttpListener] = []
        self._giving_back: asyncio.Task[None] | None = None
        self._clients, self._operators = (
            GrpcListener(
                Door(access, one.methods, max_body_bytes),
                one.services if access.is_open else (),
                listen,
                MESSAGE_ROOM * max_body_bytes,
                certificates,
            )
            for one in (clients, operators)
        )

    async def open(self, application: str) -> None:
        """Listen from now on, beside other gateways of ``application`` on this machine.

        Raises :class:`cluster.errors.ConfigError` for a port that cannot be had. None is open then.
        """
        try:
            await self._open_http(application, "http_port", self._app, self._certificates)
            if self._listen.health_port is not None:
                probe = Starlette(routes=[Route(HEALTH_PATH, healthz)])
                await self._open_http(application, "health_port", probe, None)
            await self._open_grpc(application, "grpc_port", self._clients)
            await self._open_grpc(application, "admin_port", self._operators)
            self._giving_back = asyncio.create_task(_give_back(), name="freed memory")
        except BaseException:
            await self.close(0.0)
            raise

    async def close(self, grace_s: float, *, hands_over: bool = False) -> None:
        """Accept nothing more; return when all requests are done, or cut off after ``grace_s``.

        Where it ``hands_over``, other gateways listen on the same ports.
        """
        await asyncio.gather(
            *(one.stop(grace_s) for one in self._http),
            *(one.stop(grace_s, hands_over=hands_over) for one in (self._clients, self._operators)),
        )
        if self._giving_back is not None:
            self._giving_back.cancel()
        while self._claims:
            self._claims.pop().close()

    async def _open_http(
        self, application: str, key: str, app: ASGIApp, certificates: Certificates | None
    ) -> None:
        claimed = await self._claim(application, key, listens=True)
        listener = HttpListener(
            app,
            claimed.sockets,
            claimed.close,
            self._listen,
            None if certificates is None else lambda: certificates.current().context,
        )
        self._http.append(listener)
        listener.start()

    async def _open_grpc(self, application: str, key: str, listener: GrpcListener) -> None:
        claimed = await self._claim(application, key, listens=False)
        self._claims.append(claimed)
        address, port = claimed.sockets[0].getsockname()[:2]
        await listener.start(address, port, f"{SECTION}.{key}")

    async def _claim(self, application: str, key: str, *, listens: bool) -> Claim:
        host_key = "admin_host" if key == "admin_port" else "host"
        address = resolved(self._listen.host_of(key), f"{SECTION}.{host_key}")
        port, where = self._listen.ports()[key], f"{SECTION}.{key}"

        def make() -> list[socket.socket]:
            return [open_socket(address, port, where, listens=listens)]

        return await claim(address, port, application, make, where)


async def _give_back() -> None:
    """Give back the memory of a crowd that has left; else the process keeps it for the next one."""
    process, most = psutil.Process(), 0
    while True:
        num_open = process.num_fds()
        most = max(most, num_open)
        if most - num_open >= FREED_CONNECTIONS:
            most = num_open
            gc.collect()  # a connection and its parser refer to each other
            give_back_freed()
        await asyncio.sleep(FREED_PERIOD_S)
