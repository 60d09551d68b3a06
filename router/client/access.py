"""Where a client reaches operators' methods, and the key that it shows."""

from __future__ import annotations

import os

from cluster.errors import InvalidRequestError

API_KEY_VARIABLE = "EXPERTMESH_API_KEY"
Metadata = tuple[tuple[str, str], ...]


def admin_address_of(address: str) -> str:
    """Return where gateways answer operators by default: the port after that of ``address``.

    An address without a port, such as a Unix socket's, stays as it is.
    """
    host, colon, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}" if colon and port.isdecimal() else address


def key_metadata(api_key: str | None) -> Metadata:
    """Return the metadata of calls with a key; by default that of ``EXPERTMESH_API_KEY``, if any.

    Raises :class:`InvalidRequestError`, without the key, for one that no metadata can have.
    """
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    if not key:
        return ()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InvalidRequestError(
            f"has {len(key)} characters, some of which no key has: must be printable ASCII without "
            "spaces",
            "api_key",
        )
    return (("authorization", f"Bearer {key}"),)
