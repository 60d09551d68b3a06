"""Finds marks in text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence


class MarkFinder:
    """Finds the first of some marks, and how much of a text's end may begin one."""

    def __init__(self, marks: Sequence[str]) -> None:
        """No mark may begin another."""
        self._pattern = re.compile("|".join(map(re.escape, marks)) if marks else r"(?!)")
        self._beginnings = frozenset(mark[:size] for mark in marks for size in range(1, len(mark)))
        self._longest = max(map(len, marks), default=1) - 1

    def find(self, text: str, place: int) -> tuple[int, int]:
        """Return where the first mark from ``place`` on begins and ends.

        Without one both are where the end of the text may begin a mark, or its length.
        """
        found = self._pattern.search(text, place)
        if found is not None:
            return found.span()
        lengths = range(min(self._longest, len(text) - place), 0, -1)
        kept = next((size for size in lengths if text[-size:] in self._beginnings), 0)
        return len(text) - kept, len(text) - kept


class Blanks:
    """Keeps back the white space at the end of a text that comes in pieces."""

    def __init__(self) -> None:
        self._kept: list[str] = []

    def push(self, text: str) -> str:
        """Return the text without the white space at its end, after what was kept before."""
        whole = text.rstrip()
        if not whole:
            self._kept.append(text)
            return ""
        before, self._kept = "".join(self._kept), [text[len(whole) :]]
        return before + whole

    def take(self) -> str:
        """Return the white space that is kept, and keep none."""
        kept, self._kept = "".join(self._kept), []
        return kept


class Unmarked:
    """Leaves marks out of a text that comes in pieces."""

    def __init__(self, marks: Sequence[str]) -> None:
        """No mark may begin another."""
        self._marks = MarkFinder(marks)
        self._kept = ""

    def push(self, text: str) -> str:
        """Return the text without marks, but for its end where that may begin one."""
        text, place = self._kept + text, 0
        shown: list[str] = []
        is_mark = True
        while is_mark:
            begin, end = self._marks.find(text, place)
            shown.append(text[place:begin])
            place, is_mark = end, end > begin
        self._kept = text[place:]
        return "".join(shown)

    def take(self) -> str:
        """Return the end that is kept, and keep none."""
        kept, self._kept = self._kept, ""
        return kept
