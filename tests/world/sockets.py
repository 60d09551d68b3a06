"""Sockets and selectors over a world's network; each takes the place of the class of its name."""

from __future__ import annotations

import itertools
import selectors
import socket as real
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

from tests.world.kernel import Waiter, kernel
from tests.world.network import Address, End, Listener, Network

_numbers = itertools.count(100)
by_number: WeakValueDictionary[int, Socket] = WeakValueDictionary()
"""The sockets by their descriptors."""
RECORD_BYTES = 200
"""The most bytes of a TLS record."""


def network() -> Network:
    return kernel().network


class Socket:
    """Takes the place of ``socket.socket``."""

    def __init__(
        self, family: int = real.AF_INET, type: int = real.SOCK_STREAM, proto: int = 0
    ) -> None:
        self.family = family
        self._number = next(_numbers)
        by_number[self._number] = self
        self._timeout_s: float | None = None
        self._bound: Address | None = None
        self._end: End | None = None
        self._listener: Listener | None = None
        self._watchers: dict[int, Callable[[], None]] = {}
        self._is_closed = False

    # Options.

    def setblocking(self, flag: bool) -> None:
        self._timeout_s = None if flag else 0.0

    def settimeout(self, value: float | None) -> None:
        self._timeout_s = value

    def setsockopt(self, *args: Any) -> None:
        pass

    def getsockopt(self, *args: Any) -> int:
        return 8 << 20

    def fileno(self) -> int:
        return -1 if self._is_closed else self._number

    def getsockname(self) -> Address:
        assert self._listener is not None
        return self._listener.address

    # Listening.

    def bind(self, address: Any) -> None:
        self._bound = address

    def listen(self, backlog: int = 0) -> None:
        if isinstance(self._bound, bytes):
            self._listener = network().listen(None, self._bound)
        else:
            assert self._bound is not None
            self._listener = network().listen(self._bound[0], None)
        self._listener.changed = self._changed

    def accept(self) -> tuple[Socket, Address]:
        assert self._listener is not None
        if self._is_closed or self._listener.is_closed:
            raise OSError("the socket is closed")
        if not self._listener.backlog:
            raise BlockingIOError
        return Socket._over(self._listener.backlog.popleft(), self.family), b""

    @classmethod
    def _over(cls, end: End, family: int) -> Socket:
        made = cls(family)
        made.take(end)
        return made

    def take(self, end: End) -> None:
        self._end = end
        end.changed = self._changed

    # Connections.

    def connect(self, address: Any) -> None:
        end, took_s = network().connect(address)
        timeout_s = self._timeout_s
        if took_s is None or (timeout_s is not None and took_s > timeout_s):
            Waiter(kernel()).wait(timeout_s)
            raise TimeoutError("the connection timed out")
        Waiter(kernel()).wait(took_s)
        self.take(end)

    def send(self, data: Any) -> int:
        return self._checked(self.end().send(bytes(data)), len(data))

    def sendmsg(self, pieces: Iterable[Any]) -> int:
        data = b"".join(bytes(piece) for piece in pieces)
        return self._checked(self.end().send(data), len(data))

    def _checked(self, sent: int, asked: int) -> int:
        if asked and not sent:
            raise BlockingIOError
        return sent

    def recv_into(self, room: Any) -> int:
        piece = self.end().read(len(room))
        if piece is None:
            raise BlockingIOError
        room[: len(piece)] = piece
        return len(piece)

    def end(self) -> End:
        """Return the connection's end; raises ``OSError`` where there is none any more."""
        if self._end is None or self._is_closed:
            raise OSError("the socket is closed")
        return self._end

    def shutdown(self, how: int) -> None:
        if self._listener is not None:
            network().stop(self._listener)
        elif self._end is not None and not self._is_closed:
            self._end.finish()
            self._end.is_ended = True
            self._changed()
        else:
            raise OSError("the socket is closed")

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._listener is not None and not self._listener.is_closed:
            network().stop(self._listener)
        if self._end is not None:
            self._end.close()
        self._changed()

    # What selectors ask.

    def ready(self, events: int) -> int:
        """Return those of the events for which the socket is ready."""
        if self._is_closed:
            return 0
        if self._listener is not None:
            is_readable = bool(self._listener.backlog) or self._listener.is_closed
            return selectors.EVENT_READ & events if is_readable else 0
        if self._end is None:
            return 0
        found = 0
        if events & selectors.EVENT_READ and self._end.is_readable():
            found |= selectors.EVENT_READ
        if events & selectors.EVENT_WRITE and self._end.is_writable():
            found |= selectors.EVENT_WRITE
        return found

    def watch(self, key: int, call: Callable[[], None]) -> None:
        self._watchers[key] = call

    def unwatch(self, key: int) -> None:
        self._watchers.pop(key, None)

    def _changed(self) -> None:
        for call in list(self._watchers.values()):
            call()


class TlsSocket(Socket):
    """Takes the place of ``ssl.SSLSocket``: bytes come in records, each of which is taken whole.

    The rest of a record wakes no selector. What TLS does to bytes under way is left out.
    """

    def __init__(self, over: Socket) -> None:
        super().__init__(over.family)
        self.take(over.end())
        self._record = b""

    def recv_into(self, room: Any) -> int:
        if not self._record:
            piece = self.end().read(RECORD_BYTES)
            if piece is None:
                raise BlockingIOError
            self._record = piece
        count = min(len(room), len(self._record))
        room[:count] = self._record[:count]
        self._record = self._record[count:]
        return count

    def pending(self) -> int:
        return len(self._record)


class Tls:
    """Takes the place of an ``ssl.SSLContext``."""

    def wrap_socket(self, sock: Socket, **_: Any) -> TlsSocket:
        return TlsSocket(sock)


def create_connection(address: Any, timeout: float | None = None) -> Socket:
    made = Socket(real.AF_INET)
    made.settimeout(timeout)
    made.connect(tuple(address))
    return made


class Selector:
    """Takes the place of ``selectors.DefaultSelector``."""

    def __init__(self) -> None:
        self._keys: dict[Socket, selectors.SelectorKey] = {}
        self._numbers: dict[Socket, int] = {}
        """By which sockets that are ready at once come in the order of their registration."""
        self._registered = 0
        self._changed: dict[Socket, None] = {}
        """The sockets that may be ready; the others have not changed since they were not."""
        self._waiter: Waiter | None = None

    def register(self, fileobj: Socket, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj.fileno(), events, data)  # type: ignore[arg-type]
        self._keys[fileobj] = key
        if fileobj not in self._numbers:
            self._registered += 1
            self._numbers[fileobj] = self._registered
        fileobj.watch(id(self), lambda: self._look(fileobj, events))
        self._look(fileobj, events)
        return key

    def modify(self, fileobj: Socket, events: int, data: Any = None) -> selectors.SelectorKey:
        if fileobj not in self._keys:
            raise KeyError(fileobj)
        return self.register(fileobj, events, data)

    def unregister(self, fileobj: Socket) -> selectors.SelectorKey:
        fileobj.unwatch(id(self))
        self._changed.pop(fileobj, None)
        del self._numbers[fileobj]
        return self._keys.pop(fileobj)

    def _look(self, sock: Socket, events: int) -> None:
        self._changed[sock] = None
        if self._waiter is not None and not self._waiter.is_woken and sock.ready(events):
            self._waiter.wake()

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        if not (changed := self._changed):
            return []
        found = []
        for sock in sorted(changed, key=self._numbers.__getitem__):
            key = self._keys[sock]
            if events := sock.ready(key.events):
                found.append((key, events))
            else:
                del changed[sock]
        return found

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._ready()
        if not ready and (timeout is None or timeout > 0):
            self._waiter = Waiter(kernel())
            self._waiter.wait(timeout)
            self._waiter = None
            ready = self._ready()
        return ready

    def close(self) -> None:
        for sock in list(self._keys):
            self.unregister(sock)

    def __enter__(self) -> Selector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait(socks: Iterable[Socket], timeout: float | None = None) -> list[Socket]:
    with Selector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]  # type: ignore[misc]
