"""Converts sizes in bytes from and to the text that people write and read."""

from __future__ import annotations

import re

from cluster.errors import ConfigError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


def parse_size(text: str, field: str) -> int:
    """Return the number of bytes in a text like ``24GB``, ``1.5 TB`` or ``80GiB``.

    Raises :class:`ConfigError` naming ``field`` for a missing or unknown unit, any other text, and
    a size of less than a byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in UNITS:
        allowed = ", ".join(UNITS)
        raise ConfigError(
            f"must be a number and one of {allowed}, like 24GB or 80GiB; got {text!r:.40}",
            field,
        )
    size_bytes = round(float(match[1]) * UNITS[match[2]])
    if size_bytes < 1:
        raise ConfigError(f"must be at least one byte; got {text!r:.40}", field)
    return size_bytes


def format_size(size_bytes: float) -> str:
    """Return a size in decimal units with three digits, like ``3.21 GB``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size_bytes >= 0.9995 * UNITS[unit]:
            return f"{_three_digits(size_bytes / UNITS[unit])} {unit}"
    return f"{size_bytes:.0f} B"


def format_count(count: int) -> str:
    """Return a large number in words with three digits, like ``46.7 billion``."""
    for word, unit in (("billion", 10**9), ("million", 10**6)):
        if count >= 0.9995 * unit:
            return f"{_three_digits(count / unit)} {word}"
    return f"{count:,}"


def _three_digits(value: float) -> str:
    digits = max(0, 3 - len(str(int(round(value, 2)))))
    return f"{value:,.{digits}f}"
