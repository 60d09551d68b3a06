"""Errors of libraries as one line."""

from __future__ import annotations

MAX_CHARS = 300


def described(error: Exception) -> str:
    """Return a library's error as one short printable line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"
