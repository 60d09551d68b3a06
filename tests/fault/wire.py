"""A wire between a router and expert actors that can delay, corrupt and cut what it carries.

A Unix socket of the test's own in front of an actor's, put in place by changing the address in the
actor's offer: the two ends still prove to each other that they have the offer's secret.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from cluster.frames import ALIGNMENT
from cluster.stream.connect import Ask
from cluster.stream.offer import Network, StreamOffer

DELAY_S = 0.2
_START = struct.Struct("<QQ")  # a message's length and its call's id, see cluster.stream.channel
_GREETING_MESSAGES = 2
"""An actor's first messages: its nonce and its proof."""


Fault = Literal["delayed", "corrupted", "cut"]


class Wire:
    """Carries streams; :meth:`fault` has it spoil the actors' next answers.

    ``hits`` counts the answers that were, so that a test can see that the fault hit.
    """

    def __init__(self) -> None:
        self.hits: Counter[Fault] = Counter()
        self._fault: Fault = "delayed"
        self._left = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []

    def fault(self, fault: Fault, count: int) -> None:
        """Have the next ``count`` answers, of whichever actors, come late, damaged or not."""
        with self._lock:
            self._fault, self._left = fault, count

    def between(self, ask: Ask) -> Ask:
        """Return an ``ask`` whose offers lead over this wire; Unix sockets only."""

        def asked(
            actor_id: str, generation: int, network: Network, timeout_s: float
        ) -> StreamOffer | None:
            offer = ask(actor_id, generation, network, timeout_s)
            if offer is None or offer.network is not Network.UNIX:
                return offer
            return replace(offer, address=self._listen(offer.address))

        return asked

    def close(self) -> None:
        """Break every connection."""
        self._closed.set()
        for sock in self._sockets:
            _shut(sock)

    def _listen(self, target: tuple[str, int] | bytes) -> bytes:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = b"\0wire-" + secrets.token_hex(16).encode()
        listener.bind(address)
        listener.listen(1)
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener, target), daemon=True).start()
        return address

    def _accept(self, listener: socket.socket, target: tuple[str, int] | bytes) -> None:
        with suppress(OSError):  # closed before the router came
            router, _ = listener.accept()
            actor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            actor.connect(target)
            self._sockets += [router, actor]
            threading.Thread(target=_carry, args=(router, actor), daemon=True).start()
            self._carry_answers(actor, router)

    def _carry_answers(self, actor: socket.socket, router: socket.socket) -> None:
        with suppress(OSError):
            count = 0
            while (start := _receive(actor, _START.size)) is not None:
                length, _ = _START.unpack(start)
                body = _receive(actor, length + -length % ALIGNMENT)
                if body is None:
                    break
                count += 1
                if count > _GREETING_MESSAGES:
                    body = self._altered(body)
                    if body is None:
                        break
                router.sendall(start + body)
        _shut(actor)
        _shut(router)

    def _altered(self, body: bytes) -> bytes | None:
        """Return what becomes of an answer's frame; ``None`` cuts the connection instead."""
        with self._lock:
            if not self._left:
                return body
            self._left -= 1
            fault = self._fault
            self.hits[fault] += 1
        if fault == "cut":
            return None
        if fault == "corrupted":
            return bytes([body[0] ^ 0xFF]) + body[1:]  # the frame's version
        self._closed.wait(DELAY_S)
        return body


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    _shut(target)


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
