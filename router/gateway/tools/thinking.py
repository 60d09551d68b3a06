"""Parses reasoning between ``<think>`` and ``</think>``, as Qwen3 and DeepSeek-R1 write it."""

from __future__ import annotations

from router.gateway.tools.marks import Blanks, MarkFinder
from router.gateway.tools.parts import Parsed, TextParser

MAX_BLANKS = 64
"""The most characters of white space before reasoning."""
OPENS, CLOSES = "<think>", "</think>"


class ThinkingParser:
    """Takes the beginning of a text for reasoning where it opens so; the rest is another parser's.

    With ``is_opened`` the prompt has opened it. White space around the reasoning is left out. A
    mark that comes later is text.
    """

    def __init__(self, following: TextParser, is_opened: bool) -> None:
        self._following = following
        self._state = self._in_thought if is_opened else self._at_start
        self._closes = MarkFinder((CLOSES,))
        self._blanks = Blanks()
        self._held = ""
        self._is_begun = False

    def push(self, text: str) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        return self._state(text)

    def flush(self) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        held, self._held = self._held, ""
        if self._state == self._in_thought:
            return Parsed(reasoning=self._shown(held))
        parsed = Parsed()
        if self._state == self._at_start and held:
            parsed = self._following.push(held)
        parsed.add(self._following.flush())
        return parsed

    def _at_start(self, text: str) -> Parsed:
        self._held += text
        begun = self._held.lstrip()
        is_near = len(self._held) - len(begun) < MAX_BLANKS
        if is_near and len(begun) < len(OPENS) and OPENS.startswith(begun):
            return Parsed()
        held, self._held = self._held, ""
        if is_near and begun.startswith(OPENS):
            self._state = self._in_thought
            return self._in_thought(begun.removeprefix(OPENS))
        self._state = self._following.push
        return self._following.push(held)

    def _in_thought(self, text: str) -> Parsed:
        text, self._held = self._held + text, ""
        begin, end = self._closes.find(text, 0)
        parsed = Parsed(reasoning=self._shown(text[:begin]))
        if begin == end:
            self._held = text[begin:]
            return parsed
        self._blanks.take()
        self._state = self._after_thought
        parsed.add(self._after_thought(text[end:]))
        return parsed

    def _after_thought(self, text: str) -> Parsed:
        shown = text.lstrip()
        if not shown:
            return Parsed()
        self._state = self._following.push
        return self._following.push(shown)

    def _shown(self, text: str) -> str:
        """Return the reasoning of a piece, without white space at both ends of the whole."""
        text = text if self._is_begun else text.lstrip()
        self._is_begun = self._is_begun or bool(text)
        return self._blanks.push(text)
