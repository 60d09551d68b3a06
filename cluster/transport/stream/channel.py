"""Framed messages over one non-blocking socket.

A message is a length (8 bytes), the id of its call (8 bytes), the bytes of a frame, and padding to
a multiple of ``ALIGNMENT``. Over TCP without TLS a checksum ends the frame. An actor sends an empty
frame when its answer is too long for the stream. Received bytes lie in one buffer and are returned
as views of it, so that rows go from the socket to the expert's product without another copy.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from types import ModuleType

from cluster.native import native
from cluster.transport.stream.sockets import leaves_host
from cluster.wire.checksum import CHECKSUM_BYTES, sealed, unsealed
from cluster.wire.frames import ALIGNMENT, Buffer, Buffers

MAX_MESSAGE_BYTES = 256 << 20
BUFFER_BYTES = 256 << 10
KEPT_BUFFER_BYTES = 4 << 20
_MAX_PIECES = 64
"""The most buffers of one system call."""
_START = struct.Struct("<QQ")
_PADDING = [bytes(count) for count in range(ALIGNMENT)]
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Message = tuple[int, memoryview | None]
"""The id of a call, and its frame; ``None`` if its checksum is wrong."""


class Channel:
    """One end of a connection; for one thread at a time.

    Another thread may call :meth:`write` and :meth:`shut_down` meanwhile. Bytes leave in their
    order: while any are :attr:`outgoing`, :meth:`send` adds to them.
    """

    has_more = False
    """Whether received bytes wait that do not wake a selector."""
    _native: ModuleType | None = native

    def __init__(self, sock: socket.socket, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        """Take over ``sock``. A received message over ``max_message_bytes`` is an error."""
        sock.setblocking(False)
        self.sock = sock
        self._fd = sock.fileno()
        self._is_checked = leaves_host(sock) and not isinstance(sock, ssl.SSLSocket)
        self._extra_bytes = CHECKSUM_BYTES if self._is_checked else 0
        self.outgoing: deque[memoryview] = deque()
        """Bytes that wait until the peer reads; one is dropped when it has left, not before."""
        self.queued_bytes = self.written_bytes = 0
        """How many bytes ever were outgoing, and how many of these have left."""
        self.failure: OSError | None = None
        """Why outgoing bytes cannot leave any more."""
        self._queue = threading.Lock()
        self._buffer = memoryview(b"")
        self._start = self._end = 0
        self.allow(max_message_bytes)

    def allow(self, max_message_bytes: int) -> None:
        """Set the longest message to receive from now on, and make room for it."""
        self._max_message_bytes = max_message_bytes + self._extra_bytes
        size = min(BUFFER_BYTES, _START.size + self._max_message_bytes + ALIGNMENT)
        if size > len(self._buffer):
            self._replace_buffer(size)

    def send(self, call_id: int, buffers: Buffers = ()) -> bool:
        """Send as much of a message as the peer takes now; :meth:`write` sends the rest.

        The buffers must not change before the whole message is sent. Returns false, and sends
        nothing, for a message over :data:`MAX_MESSAGE_BYTES`. Raises ``OSError`` when the
        connection is gone.
        """
        left = None
        if self._is_checked:
            buffers = sealed(buffers)
        if self._native is not None and not self.outgoing:
            most_bytes = MAX_MESSAGE_BYTES + self._extra_bytes
            left = self._native.send(self._fd, call_id, buffers, most_bytes)
        return left == 0 or self.send_rest(call_id, buffers, left)

    def send_rest(self, call_id: int, buffers: Buffers, left: int | None) -> bool:
        """Queue the last ``left`` bytes of a message, or send all of it after the waiting bytes.

        Returns and raises as :meth:`send`.
        """
        length = sum(map(len, buffers))
        if length > MAX_MESSAGE_BYTES + self._extra_bytes:
            return False
        if self.failure is not None:
            raise self.failure
        pieces = [_START.pack(length, call_id), *buffers, _PADDING[-length % ALIGNMENT]]
        rest = deque(memoryview(piece) for piece in pieces if len(piece))
        if left is not None:
            _skip(rest, _START.size + length + -length % ALIGNMENT - left)
        elif not self.outgoing:
            while rest and (sent := self._send(tuple(islice(rest, _MAX_PIECES)))):
                _skip(rest, sent)
        with self._queue:
            self.queued_bytes += sum(map(len, rest))
            self.outgoing.extend(rest)
        return True

    @property
    def can_wait(self) -> bool:
        """Whether :meth:`receive` can wait."""
        return self._native is not None

    def flush(self) -> None:
        """Send as many of the waiting bytes as the peer takes now; raises ``OSError``."""
        while self.outgoing and self.write(0):
            pass

    def write(self, wait_ms: int) -> int:
        """Send waiting bytes for ``wait_ms`` at most, as the peer takes them; returns their number.

        May be called by another thread than the other methods. With native code it needs the
        interpreter only at its begin and end, so it goes on while another thread computes. Raises
        ``OSError`` when the connection is gone.
        """
        with self._queue:
            pieces = tuple(islice(self.outgoing, _MAX_PIECES))
        sent = self._write(pieces, wait_ms)
        with self._queue:
            self.written_bytes += sent
            _skip(self.outgoing, sent)
        return sent

    def own_outgoing(self) -> None:
        """Copy the outgoing bytes, so that the memory they came from may change.

        No other thread may be in :meth:`write`.
        """
        self.outgoing = deque(memoryview(bytes(piece)) for piece in self.outgoing)

    def _write(self, pieces: tuple[memoryview, ...], wait_ms: int) -> int:
        if self._native is not None:
            written: int = self._native.write(self._fd, pieces, wait_ms)
            return written
        sent = self._send(pieces)
        if sent or not wait_ms:
            return sent
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_WRITE)
            selector.select(wait_ms / 1000)
        return self._send(pieces)

    def _send(self, pieces: Sequence[Buffer]) -> int:
        try:
            return self.sock.sendmsg(pieces)
        except _WOULD_BLOCK:
            return 0

    def receive(self, wait_ms: int = 0) -> list[Message]:
        """Return all complete messages; their bytes are valid until the next call.

        Without any received byte it waits ``wait_ms`` at most, if it :attr:`can_wait`. Raises
        ``ConnectionError`` when the peer has closed or a message is too long.
        """
        if self._start != self._end or len(self._buffer) > KEPT_BUFFER_BYTES:
            self._make_room()
        else:
            self._start = self._end = 0
        messages = self._received(wait_ms)
        if self._is_checked:
            return [(call_id, unsealed(frame)) for call_id, frame in messages]
        return messages  # type: ignore[return-value]

    @property
    def free_buffer(self) -> memoryview | None:
        """The buffer in which native code may receive, where no message has begun to arrive.

        ``None`` also where bytes are outgoing, and where they come encrypted or with a checksum.
        """
        is_free = self._start == self._end and not self.outgoing and not self._is_checked
        is_kept = len(self._buffer) <= KEPT_BUFFER_BYTES
        return self._buffer if self._native is not None and is_free and is_kept else None

    def take(self, num_bytes: int) -> list[Message]:
        """Return as :meth:`receive` the messages of bytes that are in :attr:`free_buffer`."""
        self._start, self._end = 0, num_bytes
        return self._complete()  # type: ignore[return-value]

    def _received(self, wait_ms: int) -> list[tuple[int, memoryview]]:
        if self._native is None:
            return self._receive()
        received = self._native.receive(
            self._fd, self._buffer, self._start, self._end, self._max_message_bytes, wait_ms
        )
        if received is None:
            return []
        messages: list[tuple[int, memoryview]]
        self._start, self._end, messages = received
        return messages

    def _receive(self) -> list[tuple[int, memoryview]]:
        received = self._receive_into(self._buffer[self._end :])
        if received is None:
            return []
        if not received:
            raise ConnectionError("the peer closed the stream")
        self._end += received
        return self._complete()

    def _complete(self) -> list[tuple[int, memoryview]]:
        """Return the complete messages in the buffer, which :attr:`has_begun` is without then."""
        messages: list[tuple[int, memoryview]] = []
        while self._end - self._start >= _START.size:
            length, call_id = _START.unpack_from(self._buffer, self._start)
            if length > self._max_message_bytes:
                raise ConnectionError(
                    f"a message of {length} bytes; at most {self._max_message_bytes}"
                )
            begin = self._start + _START.size
            end = begin + length + -length % ALIGNMENT
            if end > self._end:
                break
            messages.append((call_id, self._buffer[begin : begin + length]))
            self._start = end
        return messages

    def _make_room(self) -> None:
        """Move the begun message to the front of a buffer that has room for all of it."""
        left = self._end - self._start
        needed = min(len(self._buffer), BUFFER_BYTES)
        if left >= _START.size:
            length, _ = _START.unpack_from(self._buffer, self._start)
            # In proportion to the received bytes: a peer can claim any length.
            needed = max(needed, min(_START.size + length + ALIGNMENT, 4 * left))
        size = len(self._buffer)
        if needed > size or size > max(needed, KEPT_BUFFER_BYTES):
            self._replace_buffer(needed)
        elif self._start:
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left

    def _replace_buffer(self, size: int) -> None:
        """Use a new buffer; views of the old buffer keep it alive."""
        left = self._end - self._start
        buffer = memoryview(bytearray(size))
        buffer[:left] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = buffer, 0, left

    def _receive_into(self, room: memoryview) -> int | None:
        try:
            return self.sock.recv_into(room)
        except _WOULD_BLOCK:
            return None

    @property
    def has_begun(self) -> bool:
        """Whether some bytes of a message were received that is not complete."""
        return self._end > self._start

    def shut_down(self, failure: OSError | None = None) -> None:
        """End the waits of all threads for this connection; ``failure`` is why it has failed."""
        self.failure = failure
        with suppress(OSError):  # the peer has closed it
            # Not the method of a TLS socket, which would send without TLS from then on.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and drop the bytes that wait to be sent."""
        self.outgoing.clear()
        self._fd = -1
        self.sock.close()


class TlsChannel(Channel):
    """A channel over TLS; the first bytes start the handshake."""

    sock: ssl.SSLSocket
    _native = None

    def __init__(self, sock: socket.socket, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        """See :class:`Channel`."""
        super().__init__(sock, max_message_bytes)
        self._tls = threading.Lock()
        """OpenSSL takes one thread at a time for a connection."""

    def _send(self, pieces: Sequence[Buffer]) -> int:
        sent = 0
        try:
            for piece in pieces:
                while len(piece):
                    with self._tls:
                        count = self.sock.send(piece)
                    sent += count
                    piece = memoryview(piece)[count:]
        except _WOULD_BLOCK:
            pass
        return sent

    def _receive_into(self, room: memoryview) -> int | None:
        received = 0
        try:
            while received < len(room):
                with self._tls:
                    count = self.sock.recv_into(room[received:])
                if not count:
                    return received
                received += count
        except _WOULD_BLOCK:
            return received or None
        return received

    @property
    def has_more(self) -> bool:  # type: ignore[override]
        """Whether decrypted bytes wait that do not wake a selector."""
        with self._tls:
            return self.sock.pending() > 0


def _skip(pieces: deque[memoryview], count: int) -> None:
    """Drop the first bytes of pieces; pieces are never empty meanwhile where bytes remain."""
    while count:
        first = pieces[0]
        if len(first) > count:
            pieces[0] = first[count:]
            return
        count -= len(first)
        pieces.popleft()


def channel_over(sock: socket.socket, max_message_bytes: int) -> Channel:
    """Return a channel over a plain or a TLS socket."""
    kind = TlsChannel if isinstance(sock, ssl.SSLSocket) else Channel
    return kind(sock, max_message_bytes)
