"""The parts of an answer: content, reasoning, and tool calls, each a JSON text in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

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


def _some_integer(_: str) -> int:
    """Stand for an integer: Python has a bound for the digits of one, and JSON has none."""
    return 0


DECODER = json.JSONDecoder(parse_int=_some_integer, parse_constant=_refuse)
"""Reads JSON, and only the kinds of its numbers. Raises ``ValueError`` for what is no JSON."""
