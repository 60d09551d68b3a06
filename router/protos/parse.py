"""Messages from bytes, with a typed error for bytes that are none."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from cluster.errors import InvalidRequestError


def parsed(message_type: Any, data: bytes) -> Any:
    """Return the message; raises :class:`InvalidRequestError` for bytes that are none."""
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidRequestError(f"the bytes are not a {name} message") from None
