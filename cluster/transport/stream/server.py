"""An actor's end of the streams: one thread that reads frames, answers them, and writes.

The thread answers all frames together that have arrived from all routers, so that frames of several
routers share an expert's product. While it computes it reads nothing: the sockets' buffers fill,
which is the back-pressure. The thread does not read from a router that leaves its answers unread,
and closes that connection after :data:`STALLED_S`. It closes a connection with a malformed message
at once.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from cluster.log_limit import LogLimit
from cluster.transport.stream.channel import MAX_MESSAGE_BYTES, Channel, Message, channel_over
from cluster.transport.stream.handshake import (
    HELLO_BYTES,
    KEY_ID_BYTES,
    NONCE_BYTES,
    Network,
    Side,
    StreamOffer,
    new_nonce,
    proof,
)
from cluster.transport.stream.sockets import listen_on, prepare_tcp, prepare_unix
from cluster.wire.frames import Buffer, Buffers, ErrorFrame, encode

MAX_CONNECTIONS = 1024
MAX_KEYS = 1024
KEY_LIFE_S = 30.0
HELLO_TIMEOUT_S = 5.0
STALLED_S = 30.0
"""The longest time that a router may leave its answers unread."""
LOOK_S = 1.0
CLOSE_S = 5.0

logger = logging.getLogger("expertmesh.stream")

Answer = Callable[[Sequence[Buffer]], Iterable[Buffers]]
ReceivedAlone = tuple[int, int, tuple[int, Buffer, int] | None]
"""A socket, and how many bytes have come that Python has to read. Or none, the id of a call, its
answer, and how many bytes of it are left to be sent, -1 where sending failed."""


class AnswersAlone(Protocol):
    """Answers frames in native code, each of which comes while no other waits."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while :meth:`answer_alone` is to return."""
        ...

    def begin_again(self) -> None:
        """Take it that :meth:`answer_alone` has returned."""
        ...

    def answer_alone(self, epoll_fd: int, buffers: dict[int, memoryview]) -> ReceivedAlone | None:
        """Answer the frames of sockets, received into their ``buffers``, one after the other.

        Returns where something else is there, after a call for the thread's turn, or after a time
        of at most a second. With ``None`` nothing was taken from a socket that is not answered.
        """
        ...


@dataclass(slots=True, eq=False)
class _Peer:
    """A connection to a router, ``admitted`` once the router has proved that it has the secret."""

    channel: Channel
    nonce: bytes
    since_s: float
    """The time of the connection, or the time since which answers are unread."""
    admitted: bool = False


_Request = tuple[_Peer, int, Buffer]
"""A router's connection, the id of its call, and the frame."""


@dataclass(slots=True)
class _Keys:
    """Offered secrets that no connection has used yet; each opens one connection."""

    _secrets: dict[bytes, tuple[float, bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def new(self) -> tuple[bytes, bytes]:
        key_id, secret = secrets.token_bytes(KEY_ID_BYTES), secrets.token_bytes(32)
        now_s = time.monotonic()
        with self._lock:
            kept = [(k, v) for k, v in self._secrets.items() if v[0] > now_s]
            self._secrets = dict(kept[1 - MAX_KEYS :])
            self._secrets[key_id] = (now_s + KEY_LIFE_S, secret)
        return key_id, secret

    def take(self, key_id: bytes) -> bytes | None:
        with self._lock:
            until_s, secret = self._secrets.pop(key_id, (0.0, b""))
        return secret if until_s > time.monotonic() else None


class StreamServer:
    """Serves streams on a daemon thread that the first :meth:`offer` starts."""

    def __init__(
        self,
        answer: Answer,
        host: str,
        tls: ssl.SSLContext | None,
        alone: AnswersAlone | None = None,
    ) -> None:
        """``answer`` maps frames to answers on the server's thread: it is the expert actor's
        ``compute_all``. ``host`` is the address that listens for TCP streams; ``tls`` encrypts
        these. ``alone`` answers before it where it can.
        """
        self._answer = answer
        self._host = host
        self._tls = tls
        self._keys = _Keys()
        self._selector = selectors.DefaultSelector()
        epoll = getattr(selectors, "EpollSelector", ())  # only on Linux
        self._alone = alone if isinstance(self._selector, epoll) else None
        if self._alone is not None:
            self._selector.register(self._alone, selectors.EVENT_READ, self._alone)
        self._listeners: dict[Network, socket.socket] = {}
        self._peers: dict[_Peer, None] = {}
        """In the order of their arrival, by which they are read."""
        self._log_limit = LogLimit()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False

    def offer(self, network: Network) -> StreamOffer:
        """Listen on a network, and return the address and the key for one connection.

        Callable from any thread. Raises ``OSError`` where the network is not available.
        """
        with self._starting:
            if self._closing:
                raise OSError("the actor no longer serves streams")
            if network not in self._listeners:
                listener = listen_on(None if network is Network.UNIX else self._host)
                self._listeners[network] = listener
                self._selector.register(listener, selectors.EVENT_READ)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
                self._thread.start()
        return StreamOffer(network, self._listeners[network].getsockname(), *self._keys.new())

    def close(self) -> None:
        """End the thread after its current batch, and close its connections.

        Returns when the thread has ended, or after :data:`CLOSE_S`. A thread that still runs at the
        interpreter's end would abort the process when it frees a tensor.
        """
        self._closing = True
        with self._starting:
            for listener in self._listeners.values():
                with suppress(OSError):  # the thread has closed it
                    listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            self._serve_until_closed()
        finally:  # also after a failure: no router may wait for an answer from here
            self._closing = True
            for peer in list(self._peers):
                self._drop(peer, "the server is stopping")
            for listener in self._listeners.values():
                listener.close()

    def _serve_until_closed(self) -> None:
        checked_at_s = time.monotonic()
        while not self._closing:
            unread = self._unread()
            requests = [] if unread else self._answer_alone()
            was_read = requests[0][0] if requests else None
            events_of = dict.fromkeys(unread, selectors.EVENT_READ)
            for key, events in self._selector.select(0 if unread or requests else LOOK_S):
                if key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                elif key.data is self._alone:
                    self._alone.begin_again()
                else:
                    events_of[key.data] = events_of.get(key.data, 0) | events
            # Each peer is read once: a second read would overwrite the frames of the first.
            for peer, events in events_of.items():
                if peer is not was_read:
                    requests += self._serve(peer, events)
            if requests:
                self._reply(requests)
            if time.monotonic() - checked_at_s > LOOK_S:
                checked_at_s = time.monotonic()
                self._drop_stalled(checked_at_s)

    def _answer_alone(self) -> list[_Request]:
        """Answer frames in native code until other work comes; returns what it has received."""
        if self._alone is None:
            return []
        peers = {peer.channel.sock.fileno(): peer for peer in self._peers if peer.admitted}
        buffers = {fd: peer.channel.free_buffer for fd, peer in peers.items()}
        free = {fd: buffer for fd, buffer in buffers.items() if buffer is not None}
        epoll_fd: int = self._selector.fileno()  # type: ignore[attr-defined]
        if not free or (received := self._alone.answer_alone(epoll_fd, free)) is None:
            return []
        fd, num_bytes, unsent = received
        peer = peers[fd]
        try:
            if unsent is not None:
                call_id, answer, left = unsent
                if left < 0:  # the router asks again once the connection is gone
                    raise ConnectionError("cannot send an answer")
                peer.channel.send_rest(call_id, (answer,), left)
                self._watch(peer)
                return []
            # Neither kind of connection that has checksums has a free buffer.
            messages = peer.channel.take(num_bytes)
            return [(peer, call_id, frame) for call_id, frame in messages if frame is not None]
        except OSError as error:
            self._drop(peer, str(error))
        return []

    def _unread(self) -> list[_Peer]:
        """Return the peers with received bytes that do not wake the selector; only TLS has any."""
        return [peer for peer in self._peers if peer.channel.has_more] if self._tls else []

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # the router has closed it again
            return
        if len(self._peers) >= MAX_CONNECTIONS:
            if num_refused := self._log_limit.count():
                text = "%d streams are open already; refused %d"
                logger.warning(text, len(self._peers), num_refused)
            sock.close()
            return
        try:
            sock = self._prepared(sock)
        except OSError:
            sock.close()
            return
        peer = _Peer(channel_over(sock, HELLO_BYTES), new_nonce(), time.monotonic())
        self._peers[peer] = None
        self._selector.register(sock, selectors.EVENT_READ, peer)
        self._send(peer, 0, (peer.nonce,))

    def _prepared(self, sock: socket.socket) -> socket.socket:
        if sock.family == socket.AF_UNIX:
            prepare_unix(sock)
            return sock
        prepare_tcp(sock)
        if self._tls is None:
            return sock
        sock.setblocking(False)
        return self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def _serve(self, peer: _Peer, events: int) -> list[_Request]:
        """Read and write without a wait; returns the requests of an admitted router."""
        try:
            if peer.channel.outgoing:
                peer.channel.flush()
                self._watch(peer)
            if not events & selectors.EVENT_READ:
                return []
            messages = peer.channel.receive()
            intact = [(call_id, frame) for call_id, frame in messages if frame is not None]
            if len(intact) < len(messages):
                self._refuse_damaged(peer, messages)
            if peer.admitted:
                return [(peer, call_id, frame) for call_id, frame in intact]
            for _, hello in intact:  # one: a router waits for the answer to its hello
                self._admit(peer, bytes(hello))
        except (OSError, ValueError) as error:
            self._drop(peer, str(error))
        return []

    def _refuse_damaged(self, peer: _Peer, messages: Sequence[Message]) -> None:
        """Answer damaged frames by an error; raises ``ConnectionError``, which ends the connection.

        Nobody knows where the next message begins: the length may be the damaged part.
        """
        if peer.admitted:
            for call_id in [call_id for call_id, frame in messages if frame is None]:
                self._send(peer, call_id, encode(ErrorFrame.of_damage()))
        raise ConnectionError("a message arrived corrupt")

    def _admit(self, peer: _Peer, hello: bytes) -> None:
        key_id, rest = hello[:KEY_ID_BYTES], hello[KEY_ID_BYTES:]
        router_nonce, router_proof = rest[:NONCE_BYTES], rest[NONCE_BYTES:]
        secret = self._keys.take(key_id)
        if peer.admitted or secret is None:
            raise ConnectionError("a stream with an unknown key")
        expected = proof(secret, Side.ROUTER, peer.nonce, router_nonce)
        if not hmac.compare_digest(expected, router_proof):
            raise ConnectionError("a stream with a wrong secret")
        peer.admitted = True
        peer.channel.allow(MAX_MESSAGE_BYTES)
        self._send(peer, 0, (proof(secret, Side.ACTOR, peer.nonce, router_nonce),))

    def _reply(self, requests: list[_Request]) -> None:
        """Have the actor answer all requests, and send each answer to its router as it comes."""
        answers = self._answer([frame for _, _, frame in requests])
        for (peer, call_id, _), answer in zip(requests, answers, strict=True):
            if peer in self._peers:
                self._send(peer, call_id, answer)

    def _send(self, peer: _Peer, call_id: int, buffers: Buffers) -> None:
        try:
            if not peer.channel.send(call_id, buffers):
                peer.channel.send(call_id)  # empty: the answer is too long for a stream
        except OSError as error:
            self._drop(peer, str(error))
            return
        if peer.channel.outgoing:
            self._watch(peer)

    def _watch(self, peer: _Peer) -> None:
        """Wait until the router reads unread answers; without any, until it writes."""
        events = selectors.EVENT_READ  # also before the hello, where TLS reads in order to write
        if peer.admitted and peer.channel.outgoing:
            peer.since_s = time.monotonic()
            events = selectors.EVENT_WRITE
        self._selector.modify(peer.channel.sock, events, peer)

    def _drop_stalled(self, now_s: float) -> None:
        for peer in list(self._peers):
            if not peer.admitted and now_s - peer.since_s > HELLO_TIMEOUT_S:
                self._drop(peer, "no hello arrived")
            elif peer.channel.outgoing and now_s - peer.since_s > STALLED_S:
                self._drop(peer, "the router is not reading its answers")

    def _drop(self, peer: _Peer, reason: str) -> None:
        if peer not in self._peers:
            return
        del self._peers[peer]
        self._selector.unregister(peer.channel.sock)
        peer.channel.close()
        logger.debug("closed a stream: %s", reason)
