"""A gateway's HTTP port: uvicorn's HTTP/1.1 over connections that are accepted here.

Connections are counted when they are accepted, before a TLS handshake, for which uvicorn has no
limit. :mod:`router.gateway.listen.http_protocol` has the limits of heads.
When the listener drains, kept connections are not closed under a client that is about to send: the
next answer says ``Connection: close``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from router.config.listen import ListenConfig
from router.gateway.listen.http_protocol import Connections, Protocol
from router.gateway.listen.sockets import wait_readable

LOG_PERIOD_S = 10.0
KEEP_ALIVE_S = 15.0
"""Longer than clients keep a connection (httpx: 5 s), so that they close it first."""
_ACCEPT_RETRY_S = 0.5
_POLL_S = 0.05

logger = logging.getLogger("expertmesh.gateway")


class HttpListener:
    """Serves an ASGI app on listening sockets, which other gateways may share."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        limits: ListenConfig,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Accept nothing yet; ``tls`` returns the context of a new connection."""
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,  # type: ignore[arg-type]  # seconds of call_later
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._sockets, self._limits, self._tls = sockets, limits, tls
        self._connections = Connections(limits)
        self._tasks: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._logged_at_s = -LOG_PERIOD_S

    def start(self) -> None:
        """Accept connections from now on; needs a running event loop."""
        loops = [self._server.main_loop(), *(self._accept(one) for one in self._sockets)]
        self._tasks = [asyncio.create_task(one, name="HTTP listener") for one in loops]

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self._connections.total

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, and return once all connections are closed.

        Requests under way go on, and so do those that come on kept connections. What is left after
        ``grace_s`` is cut off. The sockets stay open: they are of the claim.
        """
        self._connections.drain = True
        state = self._server.server_state
        for connection in [*state.connections]:
            connection.shutdown()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._connections.total:
                    await asyncio.sleep(_POLL_S)
        for connection in [*state.connections]:
            connection.transport.abort()  # type: ignore[union-attr]
        for task in [*state.tasks, *self._handshakes, *self._tasks]:
            task.cancel()
        await asyncio.gather(*state.tasks, *self._handshakes, *self._tasks, return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            await self._connections.wait_for_room()
            await wait_readable(listening)
            try:
                accepted, address = listening.accept()
            except BlockingIOError:  # another gateway was quicker
                continue
            except OSError as error:  # no descriptors are left, or the client has gone
                logger.warning("HTTP: could not accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_RETRY_S)
                continue
            if not self._connections.enter(str(address[0])):
                accepted.close()
                self._log_refusal(str(address[0]))
                continue
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._connect(accepted, str(address[0])))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def _log_refusal(self, address: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._logged_at_s >= LOG_PERIOD_S:
            self._logged_at_s = now_s
            most = self._limits.max_connections_per_address
            logger.warning("HTTP: %s already has %d connections; refused one more", address, most)

    async def _connect(self, accepted: socket.socket, address: str) -> None:
        leave = partial(self._connections.leave, address)
        protocol = Protocol(
            self._limits,
            self._connections,
            leave,
            config=self._server.config,
            server_state=self._server.server_state,
            app_state={},
        )
        loop, context = asyncio.get_running_loop(), None if self._tls is None else self._tls()
        try:
            await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._limits.head_timeout_s,
            )
        except (OSError, TimeoutError):  # no TLS, or none in time
            accepted.close()
        finally:
            if not protocol.was_connected:
                leave()
