"""The connections of event loops over a world's network, as ``asyncio`` asks for them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

from tests.world.kernel import Kernel
from tests.world.network import End
from tests.world.sockets import Socket, network

Factory = Callable[[], asyncio.Protocol]
HIGH_WATER_BYTES = 64 << 10


class StreamTransport(asyncio.Transport):
    """One end of a connection, and the protocol that it feeds."""

    def __init__(self, loop: StreamLoop, end: End, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop = loop
        self._end = end
        self._protocol = protocol
        self._context = contextvars.copy_context()
        self._unsent = bytearray()
        self._is_closing = self._is_lost = self._is_paused = self._has_ended = False
        self._is_scheduled = self._writing_paused = False
        end.changed = self._changed
        loop.call_soon(protocol.connection_made, self, context=self._context)
        self._changed()

    def _changed(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._look, context=self._context)

    def _look(self) -> None:
        """Pass on what has arrived, and send what waits."""
        self._is_scheduled = False
        if self._is_lost:
            return
        try:
            self._flush()
            while not self._is_paused and not self._has_ended and not self._is_closing:
                piece = self._end.read(1 << 16)
                if piece is None:
                    break
                if piece:
                    self._protocol.data_received(piece)
                    continue
                self._has_ended = True
                if not self._protocol.eof_received():
                    self.close()
        except OSError as error:
            self._lose(error)

    def _flush(self) -> None:
        while self._unsent and (sent := self._end.send(bytes(self._unsent))):
            del self._unsent[:sent]
        if self._writing_paused and len(self._unsent) <= HIGH_WATER_BYTES // 4:
            self._writing_paused = False
            self._protocol.resume_writing()
        if self._is_closing and not self._unsent:
            self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            self._end.close()
            self._unsent.clear()
            self._loop.call_soon(self._protocol.connection_lost, error, context=self._context)

    def write(self, data: Any) -> None:
        if self._is_lost or self._is_closing:
            return
        self._unsent += data
        try:
            self._flush()
        except OSError as error:
            self._lose(error)
        if len(self._unsent) > HIGH_WATER_BYTES and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        self._is_closing = True
        self._changed()

    def abort(self) -> None:
        self._lose(None)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return _Options() if name == "socket" else default

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        self._changed()

    def is_reading(self) -> bool:
        return not self._is_paused

    def can_write_eof(self) -> bool:
        return False


class _Options:
    def setsockopt(self, *args: Any) -> None:
        """A world's connections end as those with these options do."""


class StreamLoop(Kernel):
    """A kernel with ``asyncio``'s accepted and opened connections."""

    async def sock_accept(self, sock: Socket) -> Any:  # type: ignore[override]
        changed = asyncio.Event()
        sock.watch(id(changed), changed.set)
        try:
            while True:
                changed.clear()
                try:
                    return sock.accept()
                except BlockingIOError:
                    await changed.wait()
        finally:
            sock.unwatch(id(changed))

    async def connect_accepted_socket(  # type: ignore[override]
        self, protocol_factory: Factory, sock: Socket, **_: Any
    ) -> Any:
        protocol = protocol_factory()
        return StreamTransport(self, sock.end(), protocol), protocol

    async def sock_connect(self, sock: Socket, address: Any) -> None:  # type: ignore[override]
        end, took_s = network().connect(address)
        if took_s is None:
            await self.create_future()  # until the caller's time is over
        else:
            await asyncio.sleep(took_s)
        sock.take(end)

    async def create_unix_connection(  # type: ignore[override]
        self, protocol_factory: Factory, path: Any = None, *, sock: Socket, **_: Any
    ) -> Any:
        return await self.connect_accepted_socket(protocol_factory, sock)

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Factory, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        end, took_s = network().connect((host, port))
        if took_s is None:
            await self.create_future()  # until the caller's time is over
        else:
            await asyncio.sleep(took_s)
        protocol = protocol_factory()
        return StreamTransport(self, end, protocol), protocol
