"""Reads one choice's text as it comes, and collects its parts, for the parsers of all formats."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import regex

MAX_DEPTH = 128
_STRING, _PLAIN = re.compile(r'[^"\\\x00-\x1f]+'), re.compile(r'[^"{}\[\]]+')
_CLOSERS = {"{": "}", "[": "]"}
_MEMBER = re.compile(r'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of one tool call; the first has the ``name``, later ones more ``arguments``."""

    index: int
    name: str
    arguments: str


@dataclass(slots=True)
class Parsed:
    """The parts of a piece of text."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)


class Calls:
    """Numbers the calls of one choice, and knows the tools that may be called.

    With ``is_held`` a call is passed on only when it is whole, and is valid; else its pieces are
    passed on as they come, once its tool is known. No more than ``most`` are passed on.
    """

    def __init__(
        self, names: Collection[str], is_held: bool = False, most: int | None = None
    ) -> None:
        self._names = frozenset(names)
        self._most = most
        self._is_held = is_held
        self._num_begun = 0
        self._num_valid = 0

    @property
    def is_full(self) -> bool:
        """Whether no further call may come."""
        return self._most is not None and self._num_valid >= self._most

    @property
    def ends_answer(self) -> bool:
        """Whether there are calls, and all of them are valid."""
        return 0 < self._num_begun == self._num_valid

    def knows(self, name: object) -> bool:
        """Return whether there is a tool of this name."""
        return isinstance(name, str) and name in self._names

    def begin(self, name: str, parsed: Parsed) -> int | None:
        """Pass on the name of a call; returns its index, ``None`` where it must wait or is none."""
        if self._is_held or self.is_full or not self.knows(name):
            return None
        return self._pass_on(name, "", parsed)

    def add(self, index: int | None, name: str, arguments: str, parsed: Parsed) -> None:
        """Count a valid call, and pass it on where it has no ``index``, as none of it was."""
        if self.is_full:
            return
        if index is None:
            self._pass_on(name, arguments, parsed)
        self._num_valid += 1

    def _pass_on(self, name: str, arguments: str, parsed: Parsed) -> int:
        parsed.calls.append(CallPart(self._num_begun, name, arguments))
        self._num_begun += 1
        return self._num_begun - 1


class JsonSpan:
    """Finds the end of a JSON object or array in text that comes in pieces.

    It follows only strings and brackets, so a span that is done may still be no JSON.
    """

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._is_escaped = False
        self.is_in_string = False
        self.is_done = False
        self.is_broken = False
        """Whether the text cannot be JSON."""

    @property
    def depth(self) -> int:
        """The brackets that are open."""
        return len(self._closers)

    def push(self, text: str, place: int, floor: int = 0) -> int:
        """Follow a text from ``place`` to where only ``floor`` brackets are open.

        Returns the place after the last character taken.
        """
        while place < len(text) and not self.is_done and not self.is_broken:
            run = None if self._is_escaped else _STRING if self.is_in_string else _PLAIN
            if run is not None and (found := run.match(text, place)):
                place = found.end()
                continue
            was_deep = self.depth > floor
            self._step(text[place])
            place += not self.is_broken
            if was_deep and self.depth == floor:
                break
        return place

    def _step(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self.is_in_string:
            self.is_in_string = self._is_escaped = char == "\\"
            self.is_broken = char not in '"\\'
        elif char == '"':
            self.is_in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            self.is_broken = self.depth > MAX_DEPTH
        else:
            self.is_broken = not self._closers or self._closers.pop() != char
            self.is_done = not self._closers and not self.is_broken


def read_call(text: str, name: str = "") -> tuple[Any, str]:
    """Return name and arguments of a call; of one with a ``name`` the text is the arguments.

    Raises ``ValueError`` where there are none. Arguments are the model's own text, as a stream
    passes it on: keys that come twice and numbers of any size stay what they are. Of members of the
    call that come twice the first holds, since a stream has passed that on.
    """
    DECODER.decode(text)
    if name:
        return name, text
    members: dict[str, tuple[Any, str]] = {}
    place = 0
    while found := _MEMBER.match(text, place):
        value, place = DECODER.raw_decode(text, found.end())
        members.setdefault(json.loads(found[1]), (value, text[found.end() : place]))
    name = members.get("name", ("", ""))[0]
    keys = [key for key in members if key in ("arguments", "parameters")]
    value, arguments = members[keys[0]] if keys else ({}, "{}")
    if isinstance(value, str):
        value, arguments = DECODER.decode(value), without_halves(value)
    if not isinstance(value, dict):
        raise ValueError("has no arguments object")
    return name, arguments


def without_halves(text: str) -> str:
    """Return a JSON text in which halves of surrogate pairs, no Unicode, are escapes again."""
    return text.encode(errors="backslashreplace").decode()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Python has a bound for the digits of an integer, and JSON has none.
DECODER = json.JSONDecoder(parse_int=lambda _: 0, parse_constant=_refuse)
"""Reads JSON, and only the kinds of its numbers. Raises ``ValueError`` for what is no JSON."""


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
