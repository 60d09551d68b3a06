"""Checks of a client's single values; each raises ``InvalidRequestError`` for its field."""

from __future__ import annotations

import math

from cluster.errors import InvalidRequestError, shown


def wrong(value: object, allowed: str) -> str:
    """Return the message for a value that is not allowed."""
    return f"must be {allowed}; got {shown(value)}"


def integer(value: object, field: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(wrong(value, f"an integer from {low} to {high}"), field)
    return value


def number(value: object, field: str, low: float, high: float, above: bool = False) -> float:
    """Return ``value`` as a float if it is a finite number from ``low`` to ``high``.

    With ``above`` it must be greater than ``low``.
    """
    allowed = f"a number above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(wrong(value, allowed), field)
    # Compared before the conversion, since an integer may be too large for a float. NaN fails.
    if not low <= value <= high or (above and value == low) or not math.isfinite(value):
        raise InvalidRequestError(wrong(value, allowed), field)
    return float(value)


def boolean(value: object, field: str) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise InvalidRequestError(wrong(value, "true or false"), field)
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
