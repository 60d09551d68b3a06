"""How what came from outside is shown in messages: short, on one line, whatever it is."""

from __future__ import annotations

from collections.abc import Sized

_MAX_CHARS = 60
_MAX_NAME_CHARS = 120
_MAX_INTEGER_BITS = 128


def shown(value: object) -> str:
    """Return a short, printable form of a value; never the inside of a container."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > _MAX_INTEGER_BITS:
            return "a very large integer"
    elif isinstance(value, (str, bytes)):
        value = value[: _MAX_CHARS + 1]
    elif value is not None and not isinstance(value, (bool, float)):
        kind = "mapping" if isinstance(value, dict) else type(value).__name__
        return f"a {kind} of {len(value)}" if isinstance(value, Sized) else f"a {kind}"
    text = repr(value)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


def shown_name(name: str) -> str:
    """Return a name as it is where it is short and printable, else as :func:`shown` does."""
    return name if name.isprintable() and len(name) <= _MAX_NAME_CHARS else shown(name)
