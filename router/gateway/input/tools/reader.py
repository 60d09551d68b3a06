"""Reads the text of one choice as it comes, for the parsers of all formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import regex

from router.gateway.input.tools.calls import Calls, Parsed

MAX_HEAD_CHARS = 1025
"""The most characters that a match may have: what stands before a call, and its first bracket."""
Found = TypeVar("Found")
Steps = Generator[None, None, Found]
"""A part of a parser, which yields where it needs more text."""


class ChoiceParser:
    """Parses the text of one choice, in time linear in the text.

    The parts of all pieces together do not depend on how the text is cut.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.text = ""
        self.place = 0
        self.is_last = False
        self.parsed = Parsed()
        """The parts that are found in the present piece of text."""
        self.kept: list[str] = []
        """The pieces of text that were taken since this list was emptied."""
        self._steps = self.read()

    @property
    def is_full(self) -> bool:
        """Whether no more may come."""
        return self.calls.is_full

    def push(self, text: str, is_last: bool) -> Parsed:
        """Take more text; returns the parts that are certain by now, after the last text all."""
        self.text, self.place = self.text[self.place :] + text, 0
        self.is_last, self.parsed = is_last, Parsed()
        next(self._steps, None)
        return self.parsed

    def finish_reason(self, reason: str | None) -> str | None:
        """Return why the choice ends: by its calls, or by the given reason."""
        if reason in (None, "stop") and self.is_full:
            return "tool_calls"
        return "tool_calls" if reason == "stop" and self.calls.ends_answer else reason

    def read(self) -> Steps[None]:
        """Read the whole text."""
        raise NotImplementedError

    def take(self, end: int | None = None) -> str:
        """Take the text up to a place, or all of it."""
        end = len(self.text) if end is None else end
        piece, self.place = self.text[self.place : end], end
        self.kept.append(piece)
        return piece

    def match(self, pattern: Any) -> Steps[Any]:
        """Take what matches a pattern here; returns the match, or ``None``.

        Where the text ends within a match there is none, but the text is taken.
        """
        while True:
            end = self.place + MAX_HEAD_CHARS
            found = pattern.match(self.text, self.place, end, partial=True)
            if found is None or (found.partial and len(self.text) >= end):
                return None
            if not found.partial or self.is_last:
                self.take(found.end())
                return None if found.partial else found
            yield

    def until(self, marks: Any, hand_over: Callable[[str], None]) -> Steps[str]:
        """Hand over the text before a mark, and take both; returns the mark.

        Where the text ends the mark is empty. Then the beginning of a mark is not taken.
        """
        while True:
            found = marks.search(self.text, self.place, partial=True)
            begin = len(self.text) if found is None else found.start()
            if begin > self.place:
                hand_over(self.take(begin))
            if found is not None and not found.partial:
                return self.take(found.end())
            if self.is_last:
                return ""
            yield


class Blanks:
    """Keeps back white space at the end of a text that comes in pieces.

    It leaves out that at the beginning, but with ``is_begun``.
    """

    def __init__(self, is_begun: bool = False) -> None:
        self.is_begun = is_begun
        self._kept: list[str] = []

    def push(self, text: str) -> str:
        """Return the text without the white space at its end, after what was kept before."""
        text = text if self.is_begun else text.lstrip()
        self.is_begun = self.is_begun or text != ""
        whole = text.rstrip()
        if not whole:
            self._kept.append(text)
            return ""
        return self.take() + whole + self.push(text[len(whole) :])

    def take(self) -> str:
        """Return the white space that is kept, and keep none."""
        kept, self._kept = "".join(self._kept), []
        return kept


@functools.lru_cache(maxsize=256)
def any_of(*marks: str) -> Any:
    """Return a pattern of marks, of which none begins another."""
    return regex.compile("|".join(map(regex.escape, marks)) or "(?!)")
