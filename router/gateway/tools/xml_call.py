"""The calls of Qwen3-Coder: parameters between marks, whose values are plain text."""

from __future__ import annotations

import re

from router.gateway.tools.calls import MAX_HEAD_CHARS, Calls, JsonSpan
from router.gateway.tools.marks import MarkFinder
from router.gateway.tools.parts import CallPart, Parsed
from router.gateway.tools.states import States
from router.gateway.tools.xml_values import TEXT, ParameterKinds, as_text, json_of

FUNCTION, PARAMETER = "<function=", "<parameter="
FUNCTION_ENDS, VALUE_ENDS = "</function>", "</parameter>"
_FUNCTION = re.compile(r"<function=(?P<name>[^\s<>]{1,64})>")
_WITH_STRINGS = frozenset({"array", "object"})
_NAME = re.compile(r"[^<>\n]*")
_NEXT = re.compile(r"\s{0,512}(?:<parameter=(?P<key>[^<>\n]{1,256})>|(?P<end></function>))")


class XmlCall:
    """One call: ``<function=NAME>``, ``<parameter=KEY>VALUE</parameter>`` each, ``</function>``.

    Its arguments become JSON, of the ``kinds`` that its tool allows. One new line at each end
    of a value is left out. A value that can be a text alone is passed on as it comes, any other
    when it is whole. A value ends at the first mark that is not within the strings of its JSON.
    """

    def __init__(self, calls: Calls, kinds: ParameterKinds) -> None:
        self._calls = calls
        self._kinds_of = kinds.of
        self._states = States(self._in_name)
        self._name = ""
        self._index: int | None = None
        self._pieces: list[str] = []
        self._arguments: list[str] = []
        self._num_parameters = 0
        self._kinds = TEXT
        self._value: list[str] = []
        self._is_begun = False
        """Whether the value has more than white space by now."""
        self._span: JsonSpan | None = None
        self._ends = MarkFinder([VALUE_ENDS])
        self.is_done = False
        self.is_broken = False
        """Whether no call goes on so."""

    @property
    def text(self) -> str:
        """The call so far."""
        return "".join(self._pieces)

    @property
    def is_passed_on(self) -> bool:
        """Whether the beginning of the call has been passed on."""
        return self._index is not None

    def push(self, text: str, place: int, parsed: Parsed) -> int:
        """Take a text from ``place`` on; returns the place after the last character taken."""
        end = self._states.run(text, place, parsed)
        self._pieces.append(text[place:end])
        return end

    def close(self, parsed: Parsed) -> bool:
        """Return whether the call, which is done, is one of a known tool."""
        if not self._calls.knows(self._name):
            return False
        self._calls.add(self._index, self._name, "".join(self._arguments), parsed)
        return True

    def _write(self, arguments: str, parsed: Parsed) -> None:
        self._arguments.append(arguments)
        if self._index is not None and arguments:
            parsed.calls.append(CallPart(self._index, "", arguments))

    def _in_name(self, text: str, place: int, parsed: Parsed) -> int:
        found = _FUNCTION.match(text, place)
        if found is None:
            return self._wait_or_break(text, place, (FUNCTION,))
        self._name, self._states.now = found["name"], self._in_between
        if self._calls.knows(self._name) and not (self._calls.is_held or self._calls.is_full):
            part = self._calls.begin(self._name)
            parsed.calls.append(part)
            self._index = part.index
        self._write("{", parsed)
        return found.end()

    def _in_between(self, text: str, place: int, parsed: Parsed) -> int:
        found = _NEXT.match(text, place)
        if found is None:
            return self._wait_or_break(text, place, (PARAMETER, FUNCTION_ENDS))
        if found["end"]:
            self._write("}", parsed)
            self.is_done, self._states.now = True, self._at_end
            return found.end()
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        self._write(f"{comma}{as_text(found['key'])}: ", parsed)
        self._kinds = self._kinds_of(self._name, found["key"])
        self._states.now = self._before_text if self._kinds == TEXT else self._in_value
        return found.end()

    def _wait_or_break(self, text: str, place: int, marks: tuple[str, ...]) -> int:
        """Break off where what follows begins none of the marks."""
        rest = text[place : place + MAX_HEAD_CHARS].lstrip()
        is_begun = any(
            mark.startswith(rest) or (rest.startswith(mark) and _NAME.fullmatch(rest, len(mark)))
            for mark in marks
        )
        if not is_begun or len(text) - place >= MAX_HEAD_CHARS:
            self.is_broken, self._states.now = True, self._at_end
        return place

    def _before_text(self, text: str, place: int, parsed: Parsed) -> int:
        self._write('"', parsed)
        self._states.now = self._in_text
        return place + text.startswith("\n", place)

    def _in_text(self, text: str, place: int, parsed: Parsed) -> int:
        begin, end = self._ends.find(text, place)
        # The last new line before the mark is none of the value's.
        until = begin - (begin > place and text[begin - 1] == "\n")
        is_whole = end > begin
        self._write(as_text(text[place:until])[1:-1] + '"' * is_whole, parsed)
        if is_whole:
            self._states.now = self._in_between
            return end
        return until

    def _in_value(self, text: str, place: int, parsed: Parsed) -> int:
        begin, end = self._ends.find(text, place)
        self._take(text[place:begin])
        if end == begin:
            return end
        if self._span is not None and self._span.is_in_string:
            self._take(text[begin:end])
            return end
        value = "".join(self._value)
        self._value, self._span, self._is_begun = [], None, False
        value = value.removeprefix("\n").removesuffix("\n")
        self._write(json_of(value, self._kinds), parsed)
        self._states.now = self._in_between
        return end

    def _take(self, piece: str) -> None:
        """Add to a value, and follow its JSON where it has brackets."""
        begun = piece if self._is_begun else piece.lstrip()
        if begun and not self._is_begun:
            self._is_begun = True
            has_brackets = begun[0] in "{[" and not self._kinds.isdisjoint(_WITH_STRINGS)
            self._span = JsonSpan() if has_brackets else None
        if self._span is not None:
            self._span.push(begun, 0)
        self._value.append(piece)

    def _at_end(self, text: str, place: int, parsed: Parsed) -> int:
        return place
