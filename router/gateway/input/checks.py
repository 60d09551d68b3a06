"""Checks of a client's single values; each raises ``InvalidRequestError`` for its field."""

from __future__ import annotations

from cluster.errors import InvalidRequestError, shown


def wrong(value: object, allowed: str) -> str:
    """Return the message for a value that is not allowed."""
    return f"must be {allowed}; got {shown(value)}"


def integer(value: object, field: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(wrong(value, f"an integer from {low} to {high}"), field)
    return value


def text(value: object, field: str) -> str:
    """Return ``value`` if it is a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRequestError(wrong(value, "a string"), field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"character {error.start} is half of a surrogate pair, not Unicode text", field
        ) from None
    return value
