"""transformers' parser of answers, which tells for each event of what text it is.

This module imports transformers; only what parses by a response template may import it.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.content_parsers import STREAMABLE_PARSERS

_OVERRIDDEN = ("_consume_prefix", "_open_explicit", "_accumulate", "_close_current")
if missing := [name for name in (*_OVERRIDDEN, "_process") if not hasattr(ResponseParser, name)]:
    # Without them the positions would be wrong, and nobody would see it.
    raise ImportError(
        f"transformers {transformers.__version__} parses answers in another way: its"
        f" ResponseParser has no {', '.join(missing)}; response templates need another version"
    )


class PlacedParser(ResponseParser):  # type: ignore[misc, no-any-unimported]
    """A parser whose events of a region's end have its ``source``: its text, and its marks'.

    transformers' events leave marks out, so of a value that is no call the text was lost.
    """

    _prompt_end = 0
    _begun_at = 0
    _taken_to = 0
    _is_dirty = False

    @property
    def unsettled(self) -> str:
        """The text of which no event has told: of a part whose value is not known all of it."""
        begin = self._pos
        if self._opened:
            begin = self._begun_at if self._is_dirty else self._taken_to
        return str(self._buffer[max(begin, self._prompt_end) :])

    def feed_into(self, events: list[dict[str, Any]], text: str) -> None:
        """Take more text; what fails leaves the events before it in ``events``."""
        self._buffer += text
        self._process(events, eos=False)

    def finish_into(self, events: list[dict[str, Any]]) -> None:
        """Take the end of the text; what fails leaves the events before it in ``events``."""
        self._process(events, eos=True)

    def _consume_prefix(self, prefix: str) -> None:
        super()._consume_prefix(prefix)
        self._prompt_end = len(self._buffer)

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        self._begun_at, self._taken_to = m.start(), m.end()
        self._is_dirty = field.content not in STREAMABLE_PARSERS
        super()._open_explicit(events, field, m)

    def _accumulate(self, events: list[dict[str, Any]], text: str) -> None:
        if not self._opened:
            self._begun_at = self._pos
        super()._accumulate(events, text)
        self._taken_to = self._pos + len(text)
        if self._opened and text:
            self._is_dirty = events[-1]["dirty"]

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        # A region without marks of its own ends with its text: another's mark may come next.
        end = self._taken_to if self._current == self._implicit_name else self._pos
        source = self._buffer[max(self._begun_at, self._prompt_end) : end]
        num_before = len(events)
        super()._close_current(events)
        for event in events[num_before:]:
            event["source"] = source
