"""uvicorn's HTTP/1.1 protocol, with limits that it lacks.

Its parser has no limit for the time of a head or its size. Nor does uvicorn count connections by
address, bound a pipeline, or drop a client that reads nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.config.listen import ListenConfig

MAX_PIPELINED = 8
UNREAD_S = 5.0
"""A connection that is closed is dropped when its client reads nothing for so long."""


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
        self._refusal: Refusal | None = None
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
                self._refuse(self._too_large)

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
            self._refusal = Refusal(429, f"over {MAX_PIPELINED} requests wait on one connection")
            raise ValueError
        super().on_headers_complete()
        if self._all.drain:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or Refusal(400, "this is not an HTTP/1.1 request"))

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
    def _too_large(self) -> Refusal:
        return Refusal(431, f"the head is over the limit of {self._limits.max_head_bytes} bytes")

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with an error, and close; nothing is said in the middle of another answer."""
        self._end_of_head()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not self.transport.is_closing() and not is_answering:
            self.transport.write(refusal.response())
        self.close()

    def _watch_head(self) -> None:
        self._head_bytes = 0
        timeout_s = self._limits.head_timeout_s
        late = Refusal(408, f"no complete request head arrived within {timeout_s:g} s")
        self._head_timer = self.loop.call_later(timeout_s, self._refuse, late)

    def _end_of_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that a connection ends with before there is a request."""

    status: int
    message: str

    def response(self) -> bytes:
        """Return the whole response, with an error as OpenAI's API has it."""
        error = {"message": self.message, "type": "invalid_request_error"}
        body = json.dumps({"error": {**error, "param": None, "code": None}}).encode()
        lines = (
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
        )
        return STATUS_LINE[self.status] + b"\r\n".join((*lines, b"", body))
