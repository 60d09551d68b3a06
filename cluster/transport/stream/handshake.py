"""The offer of a stream, and the proofs that open it; links open by the same proofs.

An actor gives a router an offer through a Ray call, with a secret for one connection. The secret
never travels over the connection: each side sends a keyed hash (HMAC, RFC 2104) of both sides'
random numbers. So a third party that has only the address cannot connect.
"""

from __future__ import annotations

import enum
import hmac
import secrets
from dataclasses import dataclass

NONCE_BYTES = 16
KEY_ID_BYTES = 16
PROOF_BYTES = 32
HELLO_BYTES = KEY_ID_BYTES + NONCE_BYTES + PROOF_BYTES


class Network(enum.StrEnum):
    """The kind of socket under a stream."""

    UNIX = "unix"
    TCP = "tcp"


class Side(enum.Enum):
    """The side that makes a proof; the other side cannot use the same proof.

    An actor listens for its routers. Links are those of :mod:`router.messages.link`.
    """

    ROUTER = b"router"
    ACTOR = b"actor"
    LINK_CALLER = b"link caller"
    LINK_LISTENER = b"link listener"


@dataclass(frozen=True, slots=True)
class StreamOffer:
    """The address of a listening actor, and the key for one connection.

    ``address`` is (host, port) for TCP and an abstract name for a Unix socket.
    """

    network: Network
    address: tuple[str, int] | bytes
    key_id: bytes
    secret: bytes


def new_nonce() -> bytes:
    """Return a random number for one connection."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, side: Side, listener_nonce: bytes, other_nonce: bytes) -> bytes:
    """Return the proof that ``side`` has the secret.

    The nonces are those of the side that listens and of the other one, each of
    :data:`NONCE_BYTES`. With nonces of its own no side takes a recorded proof.
    """
    return hmac.digest(secret, side.value + listener_nonce + other_nonce, "sha256")
