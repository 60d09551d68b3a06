"""Connections to actors, made in the background so that no step waits for them."""

from __future__ import annotations

import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait

from cluster.transport.stream.channel import MAX_MESSAGE_BYTES, Channel, channel_over
from cluster.transport.stream.handshake import (
    NONCE_BYTES,
    PROOF_BYTES,
    Network,
    Side,
    StreamOffer,
    new_nonce,
    proof,
)
from cluster.transport.stream.sockets import HAS_UNIX, prepare_tcp, prepare_unix

CONNECT_TIMEOUT_S = 5.0
RETRY_S = 1.0
WORKERS = 4

logger = logging.getLogger("expertmesh.stream")

Ask = Callable[[str, int, Network, float], StreamOffer | None]


class Connector:
    """Connects to the generation of each actor that :meth:`take` asked for last."""

    def __init__(self, ask: Ask, tls: ssl.SSLContext | None) -> None:
        """``ask(actor_id, generation, network, timeout_s)`` gets an offer from an actor."""
        self._ask = ask
        self._tls = tls
        # Several threads, so that a silent actor delays no connection to another actor.
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="connector")
        self._changed = threading.Condition()
        self._asked: dict[str, tuple[int, float]] = {}
        """By actor: the generation of the last attempt, and the earliest time of the next."""
        self._made: dict[str, tuple[int, Channel]] = {}
        self._closed = False

    def take(self, actor_id: str, generation: int, timeout_s: float) -> Channel | None:
        """Return a new connection, or ``None`` while there is none.

        Starts an attempt, unless an attempt runs or failed within the last :data:`RETRY_S`. Waits
        at most ``timeout_s`` for its end.
        """
        with self._changed:
            self._want(actor_id, generation)
            if timeout_s > 0:
                self._changed.wait_for(lambda: not self._under_way(actor_id), timeout_s)
            if self._made.get(actor_id, (None,))[0] != generation:
                return None
            self._asked.pop(actor_id, None)
            return self._made.pop(actor_id)[1]

    def close(self) -> None:
        """Close the connections that nobody took, and end the threads after their attempts."""
        with self._changed:
            self._closed = True
            for _, channel in self._made.values():
                channel.close()
            self._made.clear()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _under_way(self, actor_id: str) -> bool:
        asked = self._asked.get(actor_id)
        return actor_id not in self._made and asked is not None and asked[1] == float("inf")

    def _want(self, actor_id: str, generation: int) -> None:
        asked, again_at_s = self._asked.get(actor_id, (0, 0.0))
        if self._closed or (asked == generation and time.monotonic() < again_at_s):
            return
        self._asked[actor_id] = (generation, float("inf"))
        stale = self._made.pop(actor_id, None)
        if stale is not None:
            stale[1].close()
        self._workers.submit(self._make, actor_id, generation)

    def _make(self, actor_id: str, generation: int) -> None:
        channel = None
        try:
            channel = self._connect(actor_id, generation)
        finally:
            with self._changed:
                asked, _ = self._asked.get(actor_id, (0, 0.0))
                is_wanted = asked == generation and not self._closed
                if channel is not None and not is_wanted:
                    channel.close()
                elif channel is not None:
                    self._made[actor_id] = (generation, channel)
                elif is_wanted:
                    self._asked[actor_id] = (generation, time.monotonic() + RETRY_S)
                self._changed.notify_all()

    def _connect(self, actor_id: str, generation: int) -> Channel | None:
        # An actor of this host answers on its Unix socket. The name of another host's socket does
        # not exist here.
        for network in (Network.UNIX, Network.TCP) if HAS_UNIX else (Network.TCP,):
            try:
                offer = self._ask(actor_id, generation, network, CONNECT_TIMEOUT_S)
                if offer is None:
                    return None
                channel = greet(open_socket(offer, self._tls), offer)
            except OSError as error:
                failure = error
                continue
            logger.debug("connected to %s g%d over %s", actor_id, generation, network.value)
            return channel
        logger.warning("cannot open a stream to %s g%d (%s)", actor_id, generation, failure)
        return None


def open_socket(offer: StreamOffer, tls: ssl.SSLContext | None) -> socket.socket:
    """Connect to the offered address; raises ``OSError``."""
    if isinstance(offer.address, bytes):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            prepare_unix(sock)
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(offer.address)
        except OSError:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(offer.address[:2], CONNECT_TIMEOUT_S)
    prepare_tcp(sock)
    return sock if tls is None else tls.wrap_socket(sock)


def greet(sock: socket.socket, offer: StreamOffer) -> Channel:
    """Prove to the actor that this router has the secret, and check the actor's proof.

    Raises ``OSError``, and closes the socket, when a proof fails or takes too long.
    """
    channel = channel_over(sock, max(NONCE_BYTES, PROOF_BYTES))
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        actor_nonce = _receive_message(channel, deadline_s)
        nonce = new_nonce()
        own_proof = proof(offer.secret, Side.ROUTER, actor_nonce, nonce)
        channel.send(0, (offer.key_id, nonce, own_proof))
        expected = proof(offer.secret, Side.ACTOR, actor_nonce, nonce)
        if not hmac.compare_digest(_receive_message(channel, deadline_s), expected):
            raise ConnectionError("the other end does not have the secret")
    except OSError:
        channel.close()
        raise
    channel.allow(MAX_MESSAGE_BYTES)
    return channel


def _receive_message(channel: Channel, deadline_s: float) -> bytes:
    while True:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("no greeting arrived")
        if not channel.has_more:
            wait([channel.sock], remaining_s)
        for _, message in channel.receive():
            if message is None:
                raise ConnectionError("a greeting arrived corrupt")
            return bytes(message)
