"""Kinds of token, by which shares of experts are told."""

from __future__ import annotations

KINDS = (
    "punctuation",
    "numbers",
    "capitals",
    "words",
    "parts of words",
    "line ends and spaces",
)
SPECIAL = "special tokens"
"""The kind of tokens that are no text, such as those that begin and end one."""


def token_kind(text: str) -> str:
    """Return the kind of a token, one of KINDS, by its text and the space before it.

    A word begins after a space. Any other token with letters is a part of a word.
    """
    bare = text.strip()
    if not bare:
        return "line ends and spaces"
    if any(map(str.isdigit, bare)):
        return "numbers"
    if not any(map(str.isalpha, bare)):
        return "punctuation"
    if bare[0].isupper():
        return "capitals"
    return "words" if text[0].isspace() else "parts of words"
