"""What an actor hands to a router, over a Ray call, so that it can connect; and how both prove it.

The secret is used once and never sent: each side shows a keyed hash of both sides' random numbers
(HMAC, RFC 2104), so neither talks to a stranger who happens to have the address.
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
    """What a stream runs over."""

    UNIX = "unix"
    TCP = "tcp"


class Side(enum.Enum):
    """Who makes a proof; a proof of one side is no good as the other's."""

    ROUTER = b"router"
    ACTOR = b"actor"


@dataclass(frozen=True, slots=True)
class StreamOffer:
    """Where an actor listens, and the key for one connection.

    ``address`` is a socket address: (host, port) for TCP, an abstract name for a Unix socket.
    """

    network: Network
    address: tuple[str, int] | bytes
    key_id: bytes
    secret: bytes


def new_nonce() -> bytes:
    """Return a random number that is used once."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, side: Side, actor_nonce: bytes, router_nonce: bytes) -> bytes:
    """Return what shows that ``side`` has the secret."""
    return hmac.digest(secret, side.value + actor_nonce + router_nonce, "sha256")
