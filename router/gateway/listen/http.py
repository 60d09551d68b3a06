"""A gateway's HTTP port: uvicorn's HTTP/1.1 over connections that are accepted here.

Connections are counted when they are accepted, before a TLS handshake, for which uvicorn has no
limit. Nor does uvicorn limit the time and size of a head, count connections by address, bound a
pipeline, or drop a client that reads nothing. When the listener drains, kept connections are not
closed under a client that is about to send: the next answer says ``Connection: close``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.log_limit import LogLimit
from router.config.listen import ListenConfig
from router.gateway.listen.claim import wait_readable

MAX_PIPELINED = 8
UNREAD_S = 5.0
"""A connection that is closed is dropped when its client reads nothing for so long."""
KEEP_ALIVE_S = 15.0
"""Longer than clients keep a connection (httpx: 5 s), so that they close it first."""
_ACCEPT_RETRY_S = 0.5
_POLL_S = 0.05
logger = logging.getLogger("expertmesh.gateway")


class Connections:
    """Counts connections, in all and by address; idle ones make room for new ones."""

    def __init__(self, limits: ListenConfig) -> None:
        self.total = 0
        self.drain = False
        """Whether each answer is to be the last of its connection."""
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._idle: OrderedDict[Protocol, None] = OrderedDict()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def has_room(self) -> bool:
        """Return whether there may be one more."""
        return self._has_room.is_set()

    async def wait_for_room(self) -> None:
        """Return once there may be one more; the one that has been idle for longest gives way."""
        if not self._has_room.is_set() and self._idle:
            next(iter(self._idle)).close()
        await self._has_room.wait()

    def enter(self, address: str) -> bool:
        """Count one more of an address; returns false where it has as many as it may."""
        if self._by_address[address] >= self._limits.max_connections_per_address:
            return False
        self._by_address[address] += 1
        self.total += 1
        if self.total >= self._limits.max_connections:
            self._has_room.clear()
        return True

    def leave(self, address: str) -> None:
        """Count one less."""
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
        self.total -= 1
        self._has_room.set()

    def set_idle(self, connection: Protocol, is_idle: bool) -> None:
        """Note that a connection waits for its next request, or no more."""
        if is_idle:
            self._idle[connection] = None
        else:
            self._idle.pop(connection, None)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol of a connection, with limits for heads, pipelines and unread answers."""

    def __init__(
        self,
        limits: ListenConfig,
        connections: Connections,
        leave: Callable[[], None],
        **uvicorns: Any,
    ) -> None:
        super().__init__(**uvicorns)
        self._limits, self._all, self._leave = limits, connections, leave
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._refusal = 400, "this is not an HTTP/1.1 request"
        self.was_connected = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.was_connected = True
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_of_head()
        self._all.set_idle(self, False)
        super().connection_lost(exc)
        self._leave()

    def data_received(self, data: bytes) -> None:
        self._all.set_idle(self, False)
        # What comes after an answer is the next head, or the rest of a body that nobody waits for.
        if self._head_timer is None and self.cycle is not None and self.cycle.response_complete:
            self._watch_head()
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_head_bytes:
                self._refuse(*self._too_large)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_of_head()
        self._watch_head()

    def on_headers_complete(self) -> None:
        self._end_of_head()
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > self._limits.max_head_bytes:
            self._refusal = self._too_large
            raise ValueError  # the parser stops, and uvicorn calls send_400_response
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = 429, f"over {MAX_PIPELINED} requests wait on one connection"
            raise ValueError
        super().on_headers_complete()
        if self._all.drain:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._refusal)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._drop_unread()
        elif not self.pipeline:
            self._all.set_idle(self, True)

    def shutdown(self) -> None:
        """Close the connection after its answer; an idle one stays for a request on its way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection once its client has read the last bytes, or reads no more."""
        self.transport.close()
        self._drop_unread()

    def _drop_unread(self, num_bytes: int = 0) -> None:
        left = self.transport.get_write_buffer_size()
        if left and left == num_bytes:
            self.transport.abort()
        elif left:
            self.loop.call_later(UNREAD_S, self._drop_unread, left)

    @property
    def _too_large(self) -> tuple[int, str]:
        return 431, f"the head is over the limit of {self._limits.max_head_bytes} bytes"

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, and close; nothing is said in the middle of another answer."""
        self._end_of_head()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not self.transport.is_closing() and not is_answering:
            self.transport.write(_response(status, message))
        self.close()

    def _watch_head(self) -> None:
        self._head_bytes = 0
        timeout_s = self._limits.head_timeout_s
        late = f"no complete request head arrived within {timeout_s:g} s"
        self._head_timer = self.loop.call_later(timeout_s, self._refuse, 408, late)

    def _end_of_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _response(status: int, message: str) -> bytes:
    """Return a whole response, with an error as OpenAI's API has it."""
    error = {"message": message, "type": "invalid_request_error"}
    body = json.dumps({"error": {**error, "param": None, "code": None}}).encode()
    lines = (
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
    )
    return STATUS_LINE[status] + b"\r\n".join((*lines, b"", body))


class HttpListener:
    """Serves an ASGI app on listening sockets, which other gateways may share."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        close: Callable[[], None],
        limits: ListenConfig,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Accept nothing yet; ``tls`` returns the context of a new connection.

        ``close`` closes the sockets.
        """
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
        self._sockets, self._close = sockets, close
        self._limits, self._tls = limits, tls
        self._connections = Connections(limits)
        self._tasks: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._log_limit = LogLimit()

    def start(self) -> None:
        """Accept connections from now on; needs a running event loop."""
        loops = [self._server.main_loop(), *(self._accept(one) for one in self._sockets)]
        self._tasks = [asyncio.create_task(one, name="HTTP listener") for one in loops]

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self._connections.total

    async def stop(self, grace_s: float) -> None:
        """Close the sockets, and return once all connections are closed.

        Connections that wait to be accepted are accepted first, since closing would reset them.
        Requests under way go on, and so do those that come on kept connections. What is left after
        ``grace_s`` is cut off.
        """
        self._connections.drain = True
        state = self._server.server_state
        for connection in [*state.connections]:
            connection.shutdown()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        for one in self._sockets:
            with suppress(OSError):  # nothing waits any more
                while self._connections.has_room():
                    self._accept_one(one)
        self._close()
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
                self._accept_one(listening)
            except BlockingIOError:  # another gateway was quicker
                continue
            except OSError as error:  # no descriptors are left, or the client has gone
                logger.warning("HTTP: could not accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_RETRY_S)

    def _accept_one(self, listening: socket.socket) -> None:
        """Serve a connection that waits; raises ``OSError`` where none can be accepted."""
        accepted, (address, *_) = listening.accept()
        if not self._connections.enter(str(address)):
            accepted.close()
            self._log_refusal(str(address))
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(self._connect(accepted, str(address)))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def _log_refusal(self, address: str) -> None:
        if num_refused := self._log_limit.count():
            most = self._limits.max_connections_per_address
            text = "HTTP: %d connections refused; the last came from %s, which may have %d"
            logger.warning(text, num_refused, address, most)

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
