"""A wire between a router and expert actors that can delay, corrupt and cut what it carries.

A socket of the test's own in front of an actor's, put in place by changing the address in the
actor's offer: the two ends still prove to each other that they have the offer's secret.
"""

from __future__ import annotations

import random
import secrets
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from cluster.transport.stream.connect import Ask
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.wire.frames import ALIGNMENT

DELAY_S = 0.2
_START = struct.Struct("<QQ")
"""A message's length and the id of its call; see :mod:`cluster.transport.stream.channel`."""
_Side = Literal["router", "actor"]
_GREETING_MESSAGES: dict[_Side, int] = {"actor": 2, "router": 1}
"""Each side's first messages: an actor's nonce and proof, a router's hello."""

Fault = Literal[
    "delayed",
    "corrupted",
    "cut",
    "garbled",
    "flipped",
    "shortened",
    "flipped_frame",
    "longer",
    "longer_frame",
]
_OF_FRAMES = ("garbled", "flipped_frame", "longer_frame")
_LONGER = ("longer", "longer_frame")
LONGER_BYTES = 1 << 26
"""The bit that is flipped in the length of a ``longer`` message."""


class Wire:
    """Carries streams; :meth:`fault` has it spoil what comes next.

    ``hits`` counts the messages that were, so that a test can see that the fault hit.
    """

    def __init__(self, network: Network = Network.UNIX) -> None:
        """Carry streams of one network; over TCP actors look as if they were on another host."""
        self._network = network
        self._random = random.Random(1)
        self.hits: Counter[Fault] = Counter()
        self._fault: Fault = "delayed"
        self._left = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []

    def fault(self, fault: Fault, count: int) -> None:
        """Have the next ``count`` answers, of whichever actors, come late, damaged or not.

        ``flipped`` answers have another value of one bit, ``shortened`` ones lack their last bytes.
        ``longer`` ones claim so many bytes more that the next ones count as a part of them.
        ``garbled``, ``flipped_frame`` and ``longer_frame`` are the next frames to the actors.
        """
        with self._lock:
            self._fault, self._left = fault, count

    def between(self, ask: Ask) -> Ask:
        """Return an ``ask`` whose offers lead over this wire."""

        def asked(
            actor_id: str, generation: int, network: Network, timeout_s: float
        ) -> StreamOffer | None:
            offer = ask(actor_id, generation, network, timeout_s)
            if offer is None:
                return None
            if offer.network is not self._network:
                return replace(offer, address=b"\0no-such-name")
            return replace(offer, address=self._listen(offer.address))

        return asked

    def close(self) -> None:
        """Break every connection."""
        self._closed.set()
        for sock in self._sockets:
            _shut(sock)

    def _listen(self, target: tuple[str, int] | bytes) -> tuple[str, int] | bytes:
        address: tuple[str, int] | bytes = ("127.0.0.1", 0)
        if self._network is Network.UNIX:
            address = b"\0wire-" + secrets.token_hex(16).encode()
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(1)
        address = listener.getsockname()
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener, target), daemon=True).start()
        return address

    @property
    def _family(self) -> socket.AddressFamily:
        return socket.AF_UNIX if self._network is Network.UNIX else socket.AF_INET

    def _accept(self, listener: socket.socket, target: tuple[str, int] | bytes) -> None:
        with suppress(OSError):  # closed before the router came
            router, _ = listener.accept()
            actor = socket.socket(self._family, socket.SOCK_STREAM)
            actor.connect(target)
            self._sockets += [router, actor]
            frames = threading.Thread(
                target=self._carry, args=("router", router, actor), daemon=True
            )
            frames.start()
            self._carry("actor", actor, router)

    def _carry(self, side: _Side, source: socket.socket, target: socket.socket) -> None:
        """Carry what one side sends to the other."""
        with suppress(OSError):
            count = 0
            while (start := _receive(source, _START.size)) is not None:
                length, call_id = _START.unpack(start)
                body = _receive(source, length + -length % ALIGNMENT)
                if body is None:
                    break
                count += 1
                if count > _GREETING_MESSAGES[side]:
                    if self._is_longer(side):
                        start = _START.pack(length ^ LONGER_BYTES, call_id)
                    body = self._altered(side, body, length)
                    if body is None:
                        break
                    if len(body) < length:
                        start = _START.pack(len(body), call_id)
                        body += bytes(-len(body) % ALIGNMENT)
                target.sendall(start + body)
        _shut(source)
        _shut(target)

    def _is_longer(self, side: _Side) -> bool:
        """Return whether the next message of a side is to claim more bytes than it has."""
        with self._lock:
            return self._fault in _LONGER and self._hits(side)

    def _hits(self, side: _Side) -> bool:
        """Return whether the fault hits a side's next message, and count it; under the lock."""
        if not self._left or (self._fault in _OF_FRAMES) != (side == "router"):
            return False
        self._left -= 1
        self.hits[self._fault] += 1
        return True

    def _altered(self, side: _Side, body: bytes, length: int) -> bytes | None:
        """Return what becomes of a frame of ``length`` bytes; ``None`` cuts the connection."""
        with self._lock:
            fault = self._fault
            if fault in _LONGER or not self._hits(side):
                return body
        if fault == "cut":
            return None
        if fault in ("flipped", "flipped_frame"):
            place, bit = self._random.randrange(length), self._random.randrange(8)
            return body[:place] + bytes([body[place] ^ 1 << bit]) + body[place + 1 :]
        if fault == "shortened":
            return body[: length - self._random.randrange(1, length)]
        if fault in ("corrupted", "garbled"):
            return bytes([body[0] ^ 0xFF]) + body[1:]  # the frame's version
        self._closed.wait(DELAY_S)
        return body


def _receive(sock: socket.socket, count: int) -> bytes | None:
    """Return exactly so many bytes, or ``None`` when the connection ended."""
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
