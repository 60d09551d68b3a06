"""Parses answers by a checkpoint's own response template, with transformers' parser."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from router.gateway.tools.calls import Calls, written
from router.gateway.tools.marks import Blanks, Unmarked
from router.gateway.tools.parts import Parsed

CALLS_FIELD = "tool_calls"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
PIECES = 32
"""transformers' parser copies all text so far for each piece, so pieces grow with the text: each
has at least this part of it."""


class ResponseTemplateParser:
    """Passes on content and reasoning as they come, and each call once it is whole.

    ``prefix`` is the prompt, which may open a part of the answer. ``tools`` give arguments their
    types. From where the template does not fit the text, and calls of unknown tools are content,
    marks and white space around them included. Marks that are ``hidden`` are not shown there.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        prefix: str,
        calls: Calls,
        tools: Sequence[dict[str, Any]] = (),
        hidden: Collection[str] = (),
    ) -> None:
        # Imported here, since the command line and the client must not load transformers.
        from router.gateway.tools.placed_parser import PlacedParser

        self._parser = PlacedParser(dict(template), prefix=prefix, tools=list(tools))
        self._calls = calls
        self._hidden = Unmarked(sorted(hidden))
        self._pending: list[str] = []
        self._num_pending = 0
        self._num_fed = 0
        self._is_broken = False
        self._region: list[str] = []
        """The text of a part whose value is known at its end."""
        self._blanks = Blanks()
        self._is_begun = False
        self._in_reasoning = False
        self._follows_source = False
        """Whether the last call was none, and is content with the white space around it."""
        self._take(self._parser.initial_events)

    def push(self, text: str) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        self._pending.append(text)
        self._num_pending += len(text)
        if self._num_pending * PIECES < self._num_fed:
            return Parsed()
        return self._feed(is_last=False)

    def flush(self) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        parsed = self._feed(is_last=True)
        parsed.content += self._hidden.take()
        if self._follows_source and not self._in_reasoning:
            parsed.content += self._blanks.take()
        return parsed

    def _feed(self, is_last: bool) -> Parsed:
        text, self._pending, self._num_pending = "".join(self._pending), [], 0
        self._num_fed += len(text)
        if self._is_broken:
            return Parsed(self._hidden.push(text))
        events: list[dict[str, Any]] = []
        try:
            self._parser.feed_into(events, text)
            if is_last:
                self._parser.finish_into(events)
        except (ValueError, TypeError, KeyError, RecursionError):
            parsed = self._take(events)
            self._is_broken = True
            self._show_source(self._parser.unsettled, parsed)
            return parsed
        return self._take(events)

    def _take(self, events: list[dict[str, Any]]) -> Parsed:
        parsed = Parsed()
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_open":
                self._open(field)
            elif kind == "region_chunk" and event["dirty"]:
                self._region.append(event["text"])
            elif kind == "region_chunk":
                self._stream(field, self._hidden.push(event["text"]), parsed)
            elif field == CALLS_FIELD:
                self._add_calls(event["value"], event["source"], parsed)
                self._region = []
            elif self._region:  # a value that OpenAI's messages have no place for
                self._show(field, self._unmarked("".join(self._region)), parsed)
                self._region = []
            else:
                self._stream(field, self._hidden.take(), parsed)
        return parsed

    def _open(self, field: str) -> None:
        self._region = []
        if self._in_reasoning or not (field == CALLS_FIELD or self._follows_source):
            self._blanks, self._is_begun = Blanks(), False
        self._in_reasoning = field in REASONING_FIELDS

    def _stream(self, field: str, text: str, parsed: Parsed) -> None:
        """Pass on text, without the white space around that of its part."""
        text = text if self._is_begun else text.lstrip()
        self._is_begun = self._is_begun or bool(text)
        self._show(field, self._blanks.push(text), parsed)

    def _show_source(self, source: str, parsed: Parsed) -> None:
        """Pass on as content what is no call, and the white space before it."""
        # Where the template does not fit, what follows goes on with the same text.
        shown = self._hidden.push(source) if self._is_broken else self._unmarked(source)
        parsed.content += self._blanks.take() + shown
        self._is_begun = self._follows_source = True

    def _show(self, field: str, text: str, parsed: Parsed) -> None:
        if field in REASONING_FIELDS:
            parsed.reasoning += text
        else:
            parsed.content += text

    def _add_calls(self, value: Any, source: str, parsed: Parsed) -> None:
        found: list[tuple[str, str]] = []
        for entry in value if isinstance(value, list) else [value]:
            function = entry.get("function") if isinstance(entry, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            arguments = function.get("arguments", {}) if isinstance(function, dict) else None
            text = self._written(name, arguments)
            if text is None:
                self._show_source(source, parsed)
                return
            found.append((str(name), text))
        self._blanks.take()
        self._follows_source = self._is_begun = False
        for known, text in found:
            self._calls.add(None, known, text, parsed)

    def _written(self, name: object, arguments: object) -> str | None:
        """Return a call's arguments as JSON, ``None`` where it is no valid call."""
        if not self._calls.knows(name) or not isinstance(arguments, dict):
            return None
        try:
            return written(arguments)
        except (ValueError, TypeError):  # a number that JSON cannot write
            return None

    def _unmarked(self, text: str) -> str:
        return self._hidden.push(text) + self._hidden.take()
