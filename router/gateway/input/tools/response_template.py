"""Parses answers by a checkpoint's own response template, with transformers' parser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from router.gateway.input.tools.formats import ChatFormat
from router.gateway.input.tools.reader import (
    Blanks,
    Calls,
    ChoiceParser,
    Steps,
    any_of,
    without_halves,
)

CALLS_FIELD = "tool_calls"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
PIECES = 32
"""transformers' parser copies all text so far for each piece, so pieces grow with the text: each
has at least this part of it."""
_NO_MARK: Any = ("", None, None)
_USED = ("_scan", "_watchlist", "_accumulate", "_open_explicit", "_close_current")


class TemplateParser(ChoiceParser):
    """Passes on content and reasoning as they come, and each call once it is whole.

    The prompt may open a part of the answer. Tools give arguments their types. Calls of unknown
    tools are content, marks and white space around them included, and so is the text from where the
    template does not fit. Special tokens are not shown there.
    """

    def __init__(
        self, format_: ChatFormat, prompt: str, calls: Calls, tools: Sequence[dict[str, Any]] | None
    ) -> None:
        # Imported here, since the command line and the client must not load transformers.
        import transformers
        from transformers.utils.chat_parsing import ResponseParser
        from transformers.utils.chat_parsing.content_parsers import STREAMABLE_PARSERS

        super().__init__(calls)
        if missing := [name for name in _USED if not hasattr(ResponseParser, name)]:
            raise ImportError(
                f"transformers {transformers.__version__} parses answers differently: its"
                f" ResponseParser has no {', '.join(missing)}; response templates need another"
                " version"
            )
        self._parser: Any = ResponseParser(dict(format_.response_template or {}), "", tools=tools)
        self._streamed = STREAMABLE_PARSERS
        self._hidden = any_of(*format_.special)
        self._cut = ""
        """The end of the text that may begin a hidden mark."""
        self._is_broken = False
        self._begun = self._untold = self._prompt_end = 0
        """Where the present part begins, the text that was not passed on yet, and the answer."""
        self._blanks = Blanks()
        self._in_reasoning = False
        self._follows_source = False
        """Whether the last call was none, and is content with the white space around it."""
        self._feed(self._parser._spec.truncate_past_last_anchor(prompt), False)
        self._prompt_end = len(self._parser._buffer)

    def read(self) -> Steps[None]:
        """See :class:`router.gateway.input.tools.reader.ChoiceParser`."""
        while True:
            num_fed = 0 if self._is_broken else len(self._parser._buffer) - self._prompt_end
            if self.is_last or len(self.text) * PIECES >= num_fed:
                self._feed(self.take(), False)
            if self.is_last or self.is_full:
                break
            yield
        self._feed("", True)
        self.parsed.content += self._unmarked("", is_whole=True)
        if self._follows_source and not self._in_reasoning:
            self.parsed.content += self._blanks.take()

    def _feed(self, text: str, is_end: bool) -> None:
        self.kept.clear()
        if self._is_broken:
            self.parsed.content += self._unmarked(text)
            return
        self._parser._buffer += text
        try:
            self._process(is_end)
        except (ValueError, TypeError, KeyError, RecursionError):
            self._is_broken = True
            self._show_source(self._parser._buffer[max(self._untold, self._prompt_end) :])

    def _process(self, is_end: bool) -> None:
        """Do what transformers' parser does in its method of this name, but keep each part's text.

        Its events leave marks out, and a value that is no call must stay content with its marks.
        """
        parser, whole = self._parser, self._parser._buffer
        while True:
            best, waiting = parser._scan(parser._watchlist(), is_end)
            kind, field, mark = best or _NO_MARK
            end = mark.start() if mark else len(whole) if is_end else waiting
            name, text = parser._current, whole[parser._pos : end]
            # Some values are known only when their part ends.
            is_held = name and parser._spec.fields[name].content not in self._streamed
            if name and text:
                if not parser._opened:
                    self._begun = parser._pos
                    self._open(name)
                parser._accumulate([], text)
                if not is_held:
                    self._show(name, self._blanks.push(self._unmarked(text)))
            was_opened, body = parser._opened, parser._body
            parser._pos = end
            self._untold = self._begun if was_opened and is_held else end
            if mark is None and not is_end:
                return
            if kind == "close":
                parser._captures |= {k: v for k, v in mark.groupdict().items() if v is not None}
            parser._pos = mark.end() if mark else end
            # A region without marks of its own ends with its text: another's mark may come next.
            source_end = end if name == parser._implicit_name else parser._pos
            source = whole[max(self._begun, self._prompt_end) : source_end]
            events: list[dict[str, Any]] = []
            parser._close_current(events)
            if was_opened:
                self._close(name, body if is_held else "", events[0]["value"], source)
            if kind == "open":
                self._begun = mark.start()
                self._open(field.name)
                parser._open_explicit([], field, mark)
            elif mark is None or not (was_opened or mark[0]):
                return

    def _open(self, name: str) -> None:
        if self._in_reasoning or not (name == CALLS_FIELD or self._follows_source):
            self._blanks = Blanks()
        self._in_reasoning = name in REASONING_FIELDS

    def _close(self, name: str, body: str, value: Any, source: str) -> None:
        if name == CALLS_FIELD:
            self._add_calls(value, source)
        elif body:  # a value that OpenAI's messages have no place for
            self._show(name, self._unmarked(body, is_whole=True))
        else:
            self._show(name, self._blanks.push(self._unmarked("", is_whole=True)))

    def _show_source(self, source: str) -> None:
        """Pass on as content what is no call, and the white space before it."""
        # Where the template does not fit, more of the same text follows.
        shown = self._unmarked(source, is_whole=not self._is_broken)
        self.parsed.content += self._blanks.take() + shown
        self._blanks.is_begun = self._follows_source = True

    def _show(self, field: str, text: str) -> None:
        if field in REASONING_FIELDS:
            self.parsed.reasoning += text
        else:
            self.parsed.content += text

    def _add_calls(self, value: Any, source: str) -> None:
        found: list[tuple[str, str]] = []
        for entry in value if isinstance(value, list) else [value]:
            function = entry.get("function") if isinstance(entry, dict) else None
            call = function if isinstance(function, dict) else {}
            arguments = call.get("arguments", {})
            try:
                text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            except (ValueError, TypeError):  # a number that JSON cannot write
                text = ""
            if not (text and isinstance(arguments, dict) and self.calls.knows(call.get("name"))):
                self._show_source(source)
                return
            found.append((call["name"], without_halves(text)))
        self._blanks = Blanks()
        self._follows_source = False
        for name, text in found:
            self.calls.add(None, name, text, self.parsed)

    def _unmarked(self, text: str, is_whole: bool = False) -> str:
        """Return a text without hidden marks, but for its end where that may begin one."""
        *before, last = self._hidden.split(self._cut + text)
        found = None if is_whole else self._hidden.search(last, partial=True)
        end = len(last) if found is None else found.start()
        self._cut = last[end:]
        return "".join(before) + last[:end]
