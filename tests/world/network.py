"""The network of a world: hosts, links that are slow, cut or damaged, and connections over them.

A connection is a pair of ends. Bytes arrive in their order, after the delay of the link. While a
link is cut they wait, as TCP's do; an end that waits for :data:`TCP_TIMEOUT_S` breaks. The end of a
process closes its ends: the peers are told, unless the host is down or the link is cut.
"""

from __future__ import annotations

import contextvars
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.world.kernel import Kernel, Process, current_process

WINDOW_BYTES = 64 << 10
"""What a connection holds in one direction before its reader takes it."""
TCP_TIMEOUT_S = 5.0
"""How long unacknowledged bytes, or a silent host, are borne."""
LOCAL_DELAY_S = 0.00005

Address = tuple[str, int] | bytes


@dataclass(slots=True)
class Link:
    """One direction between two hosts."""

    delay_s: float
    jitter_s: float
    is_cut: bool = False
    cut_until_s: float = -99.0
    """When it was mended last."""
    damage: float = 0.0
    """The share of messages of which a byte is changed."""


@dataclass(eq=False, slots=True)
class End:
    """One end of a connection; ``changed`` is called when it can be read, written or is broken."""

    network: Network
    process: Process | None
    address: Address
    is_unix: bool
    peer: End | None = None
    received: bytearray = field(default_factory=bytearray)
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)
    """When what the peer has sent is due, and its bytes; none are the end of the stream."""
    under_way_bytes: int = 0
    is_ended: bool = False
    """The peer sends nothing more."""
    is_closed: bool = False
    error: OSError | None = None
    changed: Callable[[], None] = lambda: None
    last_at_s: float = 0.0

    def room(self) -> int:
        peer = self.peer
        if peer is None or peer.is_closed:
            return WINDOW_BYTES  # the error comes with the answer
        return WINDOW_BYTES - len(peer.received) - peer.under_way_bytes

    def send(self, data: bytes) -> int:
        """Send as much as there is room for; raises ``OSError`` where the connection is broken."""
        if self.error is not None:
            raise self.error
        if self.is_closed:
            raise OSError("the socket is closed")
        assert self.peer is not None
        piece = bytes(data[: max(0, self.room())])
        if piece:
            self.network.carry(self, self.peer, piece)
        return len(piece)

    def read(self, most: int) -> bytes | None:
        """Return received bytes, nothing at the stream's end, and ``None`` where none are there."""
        if self.received:
            piece = bytes(self.received[:most])
            del self.received[:most]
            if self.peer is not None:
                self.peer.changed()
            return piece
        if self.error is not None:
            raise self.error
        return b"" if self.is_ended else None

    def is_readable(self) -> bool:
        return bool(self.received) or self.is_ended or self.error is not None

    def is_writable(self) -> bool:
        return self.error is not None or self.room() > 0

    def finish(self) -> None:
        if self.error is None and self.peer is not None and not self.is_closed:
            self.network.carry(self, self.peer, b"")

    def close(self) -> None:
        """Send the end of the stream and take nothing more."""
        if not self.is_closed:
            self.finish()
            self.is_closed = True

    def break_off(self, error: OSError) -> None:
        if self.error is None and not self.is_closed:
            self.error = error
            self.changed()


@dataclass(eq=False, slots=True)
class Listener:
    process: Process | None
    address: Address
    backlog: deque[End] = field(default_factory=deque)
    changed: Callable[[], None] = lambda: None
    is_closed: bool = False


class Network:
    """The hosts of a world, by name, and all connections between them."""

    def __init__(self, kernel: Kernel, hosts: list[str]) -> None:
        self._kernel = kernel
        self._ports = itertools.count(20000)
        self.addresses = {host: f"10.0.0.{i + 1}" for i, host in enumerate(hosts)}
        self._hosts = {address: host for host, address in self.addresses.items()}
        self.links: dict[tuple[str, str], Link] = {
            (a, b): Link(0.0004, 0.0006) for a in hosts for b in hosts if a != b
        }
        self._listeners: dict[tuple[str, Address], Listener] = {}
        self._ends: dict[End, None] = {}
        self._waiting: list[Callable[[], None]] = []
        self._down: set[str] = set()
        self.hidden: set[int] = set()
        """The processes, by their ids, to which no connection can be made."""
        self.nobody = contextvars.Context()
        """The context of what no process does."""

    # Links.

    def cut(self, pairs: list[tuple[str, str]]) -> None:
        for pair in pairs:
            self.links[pair].is_cut = True

    def heal(self) -> None:
        """Mend all links; what waited for them leaves."""
        for link in self.links.values():
            if link.is_cut:
                link.is_cut, link.cut_until_s = False, self._kernel.now_s
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()
        for end in list(self._ends):
            self._move(end)

    def is_cut(self, source: str, target: str) -> bool:
        """Return whether nothing passes from one host to another."""
        if source in self._down or target in self._down:
            return True
        return source != target and self.links[source, target].is_cut

    def was_cut(self, one: str, other: str, for_s: float) -> bool:
        if one == other:
            return False
        since_s = self._kernel.now_s - for_s
        both = (self.links[one, other], self.links[other, one])
        return any(link.is_cut or link.cut_until_s > since_s for link in both)

    def when_mended(self, call: Callable[[], None]) -> None:
        self._waiting.append(call)

    def delay_s(self, source: str, target: str) -> float:
        """Draw the time that a message takes."""
        if source == target:
            return LOCAL_DELAY_S
        link = self.links[source, target]
        return link.delay_s + link.jitter_s * self._kernel.random.random()

    def damaged(self, source: str, target: str, data: bytes) -> bytes:
        """Return a message as it arrives."""
        if source == target or not data:
            return data
        share = self.links[source, target].damage
        if not share or self._kernel.random.random() >= share:
            return data
        place = self._kernel.random.randrange(len(data))
        changed = data[place] ^ (1 << self._kernel.random.randrange(8))
        return data[:place] + bytes([changed]) + data[place + 1 :]

    # Connections.

    def listen(self, address: str | None, name: Address | None) -> Listener:
        process = current_process()
        host = process.node if process else ""
        where: Address = name if isinstance(name, bytes) else (str(address), next(self._ports))
        listener = Listener(process, where)
        self._listeners[host, where] = listener
        if process is not None:
            process.on_end.append(lambda: self.stop(listener))
        return listener

    def stop(self, listener: Listener) -> None:
        host = listener.process.node if listener.process else ""
        self._listeners.pop((host, listener.address), None)
        listener.is_closed = True
        for end in listener.backlog:
            end.close()
        listener.changed()

    def connect(self, address: Address) -> tuple[End, float | None]:
        """Begin a connection; returns its end, and when it is made, ``None`` for never.

        Raises ``OSError`` where nobody listens.
        """
        process = current_process()
        source = process.node if process else ""
        is_unix = isinstance(address, bytes)
        target = source if isinstance(address, bytes) else self._hosts.get(address[0], "")
        if not is_unix and (self.is_cut(source, target) or self.is_cut(target, source)):
            return self._end(process, address, is_unix), None
        listener = self._listeners.get((target, address))
        if listener is None:
            raise ConnectionRefusedError("nobody listens there")
        if listener.process is not None and listener.process.pid in self.hidden:
            if is_unix:
                raise ConnectionRefusedError("that name is of another namespace")
            return self._end(process, address, is_unix), None
        own = self._end(process, address, is_unix)
        other = self._end(listener.process, address, is_unix)
        own.peer, other.peer = other, own
        took_s = self.delay_s(source, target) + self.delay_s(target, source)
        self._kernel.call_later(took_s, self._arrive, listener, other)
        return own, took_s

    def _arrive(self, listener: Listener, end: End) -> None:
        if listener.is_closed:
            end.close()
        else:
            listener.backlog.append(end)
            listener.changed()

    def _end(self, process: Process | None, address: Address, is_unix: bool) -> End:
        end = End(self, process, address, is_unix)
        self._ends[end] = None
        if process is not None:
            process.on_end.append(end.close)
        return end

    def carry(self, source: End, target: End, piece: bytes) -> None:
        """Bring bytes, or the end of the stream, to the other end."""
        a, b = self._hosts_of(source, target)
        if not source.is_unix:
            piece = self.damaged(a, b, piece)
        delay_s = LOCAL_DELAY_S if source.is_unix else self.delay_s(a, b)
        target.last_at_s = max(target.last_at_s, self._kernel.now_s + delay_s)
        target.under_way.append((target.last_at_s, piece))
        target.under_way_bytes += len(piece)
        self._kernel.call_at(target.last_at_s, self._move, target, context=self.nobody)

    def _hosts_of(self, source: End, target: End) -> tuple[str, str]:
        a, b = source.process, target.process
        return (a.node if a else ""), (b.node if b else "")

    def _move(self, target: End) -> None:
        """Let arrive what was due by now, unless the link is cut."""
        source = target.peer
        if source is None or not target.under_way:
            return
        a, b = self._hosts_of(source, target)
        if not target.is_unix and (self.is_cut(a, b) or self.is_cut(b, a)):
            first = target.under_way[0]
            self._kernel.call_later(
                TCP_TIMEOUT_S, self._time_out, target, first, context=self.nobody
            )
            return
        while target.under_way and target.under_way[0][0] <= self._kernel.now_s:
            _, piece = target.under_way.popleft()
            target.under_way_bytes -= len(piece)
            if target.is_closed:
                source.break_off(ConnectionResetError("the peer has closed the connection"))
            elif piece:
                target.received += piece
            else:
                target.is_ended = True
        target.changed()

    def _time_out(self, target: End, first: tuple[float, bytes]) -> None:
        """Break both ends of a connection whose bytes could not pass for long."""
        if target.under_way and target.under_way[0] is first:
            for end in (target, target.peer):
                if end is not None:
                    end.break_off(TimeoutError("the connection timed out"))

    def hide(self, process: Process) -> None:
        """Break the connections of a process, and let nobody connect to it.

        By TCP nobody answers; its Unix sockets are not found, as those of another namespace.
        """
        self.hidden.add(process.pid)
        for end in list(self._ends):
            if end.process is process and end.peer is not None:
                for one in (end, end.peer):
                    one.break_off(ConnectionResetError("the connection is reset"))

    def lose_host(self, host: str) -> None:
        """Take a host down: its peers hear nothing more, and give up after a while."""
        self._down.add(host)
        for end in list(self._ends):
            if end.process is not None and end.process.node == host and end.peer is not None:
                error = TimeoutError("the host is down")
                self._kernel.call_later(
                    TCP_TIMEOUT_S, end.peer.break_off, error, context=self.nobody
                )

    def add_host(self, host: str) -> None:
        others = list(self.addresses)
        self.addresses[host] = address = f"10.0.0.{len(others) + 1}"
        self._hosts[address] = host
        for other in others:
            self.links[host, other] = Link(0.0004, 0.0006)
            self.links[other, host] = Link(0.0004, 0.0006)
