"""Parses calls between marks: those of Qwen, Mistral, DeepSeek and SmolLM2."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from router.gateway.tools.calls import MAX_HEAD_CHARS, Call, Calls
from router.gateway.tools.marks import Blanks, MarkFinder
from router.gateway.tools.parts import Parsed
from router.gateway.tools.states import States
from router.gateway.tools.xml_call import XmlCall
from router.gateway.tools.xml_values import ParameterKinds

MAX_TAIL_CHARS = 64
_ARGUMENTS = re.compile(r"\{")
_XML = re.compile(r"<|(?=[^\s<])")
_CALL_OR_LIST = re.compile(r"\{|\[(?=\s*[{\]])|(?=[^\s\[{])|(?=\[\s*[^\s{\]])")
"""A bracket that no call follows is no list: a mark may begin there."""


@dataclass(frozen=True, slots=True)
class CallMarks:
    """How calls stand in a text: ``opens``, ``head``, JSON, ``tail``, ``closes``.

    With a group ``name`` in ``head``, a regular expression, the JSON is the arguments. Without one
    it is an object with ``name`` and ``arguments``, or a list of such objects. ``closes`` may be
    empty, and then so is ``tail``. ``around`` stand before the first call and after the last,
    ``within`` in the head. With ``is_xml`` there is an :class:`XmlCall` in place of JSON.
    """

    opens: str
    closes: str = ""
    around: tuple[str, ...] = ()
    head: str = r"\s*"
    tail: str = r"\s{0,32}"
    within: tuple[str, ...] = ()
    is_xml: bool = False

    @property
    def has_named_head(self) -> bool:
        """Whether the name stands before the JSON."""
        return "(?P<name>" in self.head

    @property
    def begins(self) -> re.Pattern[str]:
        """Finds where a call begins after its head, or that none does."""
        if self.is_xml:
            return _XML
        return _ARGUMENTS if self.has_named_head else _CALL_OR_LIST


class MarkedParser:
    """Parses one choice's text; what is no valid call stays content.

    ``hidden`` are marks that are special tokens, which content does not show. A call that breaks
    off after it was passed on ends there, and what follows is content. ``schemas`` are the
    parameters of tools by their names.
    """

    def __init__(
        self,
        marks: CallMarks,
        calls: Calls,
        hidden: Collection[str] = (),
        schemas: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        self._marks = marks
        self._calls = calls
        self._hidden = MarkFinder(sorted(hidden))
        self._finder = MarkFinder([*dict.fromkeys((marks.opens, *marks.around, *hidden))])
        self._head = re.compile(marks.head)
        self._kinds = ParameterKinds(schemas)
        self._ends = re.compile(marks.tail + re.escape(marks.closes))
        self._blanks = Blanks()
        self._states = States(self._in_text)
        self._lead = ""
        """The text of the region before its call."""
        self._call: Call | XmlCall | None = None
        self._is_list = False
        self._follows_call = False

    def push(self, text: str) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        return self._states.push(text)

    def flush(self) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        parsed = Parsed()
        held = self._states.take()
        if self._call is not None and not self._call.is_passed_on:
            self._content(self._lead + self._call.text + held, parsed)
        elif self._states.now == self._in_head:
            self._content(self._lead + held, parsed)
        elif self._states.now == self._in_text or (
            self._states.now == self._in_tail and not self._may_be_tail(held)
        ):
            self._content(held, parsed)
        if not self._follows_call:
            parsed.content += self._blanks.take()
        return parsed

    def _content(self, text: str, parsed: Parsed) -> None:
        """Pass on content, without hidden marks."""
        if self._calls.is_full:
            return
        place = 0
        kept: list[str] = []
        while place < len(text):
            begin, end = self._hidden.find(text, place)
            is_mark = end > begin
            kept.append(text[place : begin if is_mark else len(text)])
            place = end if is_mark else len(text)
        shown = self._blanks.push("".join(kept))
        if shown:
            self._follows_call = False
            parsed.content += shown

    def _in_text(self, text: str, place: int, parsed: Parsed) -> int:
        if self._calls.is_full:
            return len(text)
        begin, end = self._finder.find(text, place)
        self._content(text[place:begin], parsed)
        if text[begin:end] == self._marks.opens:
            self._lead, self._states.now = self._marks.opens, self._in_head
        return end

    def _in_head(self, text: str, place: int, parsed: Parsed) -> int:
        found = self._marks.begins.search(text, place, place + MAX_HEAD_CHARS)
        closes = self._marks.closes
        is_closed = closes != "" and 0 <= text.find(closes, place) < (
            len(text) if found is None else found.start()
        )
        if found is None and not is_closed and len(text) - place < MAX_HEAD_CHARS:
            return place
        head = None
        if found is not None and found[0] and not is_closed:
            head = self._head.fullmatch(text, place, found.start())
        if head is None or found is None:
            self._states.now = self._in_text
            self._content(self._lead, parsed)
            return place
        self._lead += text[place : found.start()]
        self._is_list = found[0] == "["
        if self._is_list:
            self._lead += "["
            self._states.now = self._in_list
            return found.end()
        name = head["name"].strip() if self._marks.has_named_head else ""
        self._begin(name)
        return found.start()

    def _begin(self, name: str = "") -> None:
        is_xml = self._marks.is_xml
        self._call = XmlCall(self._calls, self._kinds) if is_xml else Call(self._calls, name)
        self._states.now = self._in_call

    def _in_call(self, text: str, place: int, parsed: Parsed) -> int:
        call = self._call
        if call is None:
            return place
        place = call.push(text, place, parsed)
        if call.is_passed_on:
            self._after_call()
        if call.is_broken or call.is_done:
            self._call = None
            is_valid = call.is_done and call.close(parsed)
            if is_valid:
                self._after_call()
            elif not call.is_passed_on:
                self._content(self._lead + call.text, parsed)
            self._lead = ""
            following = self._in_list if self._is_list else self._in_tail
            self._states.now = following if is_valid else self._in_text
        return place

    def _after_call(self) -> None:
        self._blanks.take()
        self._follows_call = True

    def _in_list(self, text: str, place: int, parsed: Parsed) -> int:
        char = text[place]
        if char == "{":
            self._begin()
            return place
        if char == "]":
            self._lead, self._states.now = "", self._in_tail
            return place + 1
        if not (char.isspace() or char == ",") or len(self._lead) > MAX_HEAD_CHARS:
            lead, self._lead, self._states.now = self._lead, "", self._in_text
            self._content(lead, parsed)
            return place
        self._lead += char
        return place + 1

    def _in_tail(self, text: str, place: int, parsed: Parsed) -> int:
        found = self._ends.match(text, place)
        if found is None and self._may_be_tail(text[place : place + MAX_TAIL_CHARS]):
            return place
        self._states.now = self._in_text
        return place if found is None else found.end()

    def _may_be_tail(self, text: str) -> bool:
        """Return whether a text may begin what stands after a call."""
        rest = text.strip().removeprefix("```" if "```" in self._marks.tail else "").strip()
        return len(text) < MAX_TAIL_CHARS and (
            self._marks.closes.startswith(rest)
            or ("```" in self._marks.tail and rest in ("`", "``"))
        )
