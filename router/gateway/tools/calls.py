"""The tool calls of one choice, each a JSON text that comes in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from router.gateway.tools.parts import CallPart, Parsed

MAX_HEAD_CHARS = 1024
"""The most characters before the arguments of a call; a name has at most 64."""
MAX_DEPTH = 128
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_BETWEEN = re.compile(r'[^"{}\[\]]+')
_CLOSERS = {"{": "}", "[": "]"}
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class JsonSpan:
    """Finds the end of a JSON object or array in text that comes in pieces.

    It follows strings and brackets alone, so a span that is done may still be no JSON.
    """

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self.is_done = False
        self.is_broken = False
        """Whether no JSON goes on so."""

    @property
    def is_in_string(self) -> bool:
        """Whether a string is open."""
        return self._in_string and not self.is_broken

    def push(self, text: str, place: int) -> int:
        """Follow a text from ``place`` on; returns the place after the last character taken."""
        while place < len(text) and not self.is_done and not self.is_broken:
            place = self._string(text, place) if self._in_string else self._outside(text, place)
        return place

    def _string(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        if found := _IN_STRING.match(text, place):
            return found.end()
        self._in_string = text[place] != '"'
        self._escaped = text[place] == "\\"
        self.is_broken = self._in_string and not self._escaped
        return place if self.is_broken else place + 1

    def _outside(self, text: str, place: int) -> int:
        if found := _BETWEEN.match(text, place):
            return found.end()
        char = text[place]
        if char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            self.is_broken = len(self._closers) > MAX_DEPTH
        elif not self._closers or self._closers.pop() != char:
            self.is_broken = True
        else:
            self.is_done = not self._closers
        return place if self.is_broken else place + 1


class Calls:
    """Numbers the calls of one choice, and knows the tools that may be called.

    With ``is_held`` a call is passed on when it is whole, and is valid; else its pieces are passed
    on as they come, once its tool is known. No more than ``most`` are passed on.
    """

    def __init__(
        self, names: Collection[str], is_held: bool = False, most: int | None = None
    ) -> None:
        self._names = frozenset(names)
        self._most = most
        self.is_held = is_held
        self.num_begun = 0
        self.num_valid = 0

    @property
    def is_full(self) -> bool:
        """Whether no further call may come."""
        return self._most is not None and self.num_valid >= self._most

    @property
    def ends_answer(self) -> bool:
        """Whether there are calls, and all of them are valid."""
        return 0 < self.num_begun == self.num_valid

    def knows(self, name: object) -> bool:
        """Return whether there is a tool of this name."""
        return isinstance(name, str) and name in self._names

    def begin(self, name: str) -> CallPart:
        """Return the first piece of the next call."""
        self.num_begun += 1
        return CallPart(self.num_begun - 1, name, "")

    def add(self, index: int | None, name: str, arguments: str, parsed: Parsed) -> None:
        """Count a valid call, and pass it on where it has no ``index``, as none of it was."""
        if self.is_full:
            return
        if index is None:
            parsed.calls.append(replace(self.begin(name), arguments=arguments))
        self.num_valid += 1


class Call:
    """One call: ``{"name": …, "arguments": {…}}``, or of a given ``name`` the arguments alone."""

    def __init__(self, calls: Calls, name: str = "") -> None:
        self._calls = calls
        self._name = name
        self._span = JsonSpan()
        self._pieces: list[str] = []
        self._head = ""
        self._arguments: JsonSpan | None = None
        self._index: int | None = None

    @property
    def text(self) -> str:
        """The call so far."""
        return "".join(self._pieces)

    @property
    def is_begun(self) -> bool:
        """Whether anything of it has come."""
        return bool(self._pieces)

    @property
    def is_passed_on(self) -> bool:
        """Whether the beginning of the call has been passed on."""
        return self._index is not None

    @property
    def is_broken(self) -> bool:
        """Whether no JSON goes on so."""
        return self._span.is_broken

    @property
    def is_done(self) -> bool:
        """Whether its last bracket is closed."""
        return self._span.is_done

    def push(self, text: str, place: int, parsed: Parsed) -> int:
        """Take a text from ``place`` on; returns the place after the last character taken."""
        end = self._span.push(text, place)
        piece = text[place:end]
        self._pieces.append(piece)
        if not self._calls.is_held and not self._calls.is_full:
            self._pass_on(piece, parsed)
        return end

    def close(self, parsed: Parsed) -> bool:
        """Return whether the call, which is done, is one of a known tool, and JSON."""
        try:
            name, arguments = self._parts(self.text)
        except (ValueError, RecursionError):
            return False
        self._calls.add(self._index, name, arguments, parsed)
        return True

    def _pass_on(self, piece: str, parsed: Parsed) -> None:
        if self._arguments is None:
            if len(self._head) > MAX_HEAD_CHARS:
                return
            self._head += piece
            # The bracket behind a head is matched too. Of a longer text no more is, as the head of
            # one that comes in small pieces grows no longer.
            found = None if self._name else _HEAD.match(self._head, 0, MAX_HEAD_CHARS + 1)
            name = _text_of(found[1]) if found else self._name
            if not self._calls.knows(name):
                return
            part = self._calls.begin(name)
            parsed.calls.append(part)
            self._index = part.index
            self._arguments = JsonSpan()
            piece = self._head[found.end() if found else 0 :]
        end = self._arguments.push(piece, 0)
        if end and self._index is not None:
            parsed.calls.append(CallPart(self._index, "", piece[:end]))

    def _parts(self, text: str) -> tuple[str, str]:
        """Return name and arguments; raises ``ValueError`` where there are none.

        Arguments are the model's own text, as a stream passes it on: keys that come twice and
        numbers of any size stay what they are. Of members of the call that come twice the first
        holds, since a stream has passed that on.
        """
        if self._name:
            DECODER.decode(text)
            return self._known(self._name), text
        members = _members(text)
        name = self._known(members["name"].value if "name" in members else None)
        places = [members[key] for key in members if key in ("arguments", "parameters")]
        if not places:
            return name, "{}"
        arguments = places[0]
        if isinstance(arguments.value, str):
            if not isinstance(DECODER.decode(arguments.value), dict):
                raise ValueError("has no object of arguments")
            return name, without_halves(arguments.value)
        if not isinstance(arguments.value, dict):
            raise ValueError("has no object of arguments")
        return name, text[arguments.begin : arguments.end]

    def _known(self, name: object) -> str:
        if not isinstance(name, str) or not self._calls.knows(name):
            raise ValueError("names no known tool")
        return name


def written(arguments: Mapping[str, Any]) -> str:
    """Return arguments as JSON; raises ``ValueError`` for numbers that JSON cannot write."""
    return without_halves(json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def without_halves(text: str) -> str:
    """Return a JSON text in which halves of surrogate pairs, no Unicode, are escapes again."""
    return text.encode(errors="backslashreplace").decode()


def _text_of(quoted: str) -> str:
    """Return a JSON string's text, empty where it is no JSON: the call's end tells that too."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@dataclass(frozen=True, slots=True)
class _Member:
    """The value of a member of a JSON object, and its places in the text."""

    value: Any
    begin: int
    end: int


def _some_integer(_: str) -> int:
    """Stand for an integer: Python has a bound for the digits of one, and JSON has none."""
    return 0


DECODER = json.JSONDecoder(parse_int=_some_integer, parse_constant=_refuse)
"""Reads JSON, and of its numbers the kinds alone. Raises ``ValueError`` for what is no JSON."""
_BLANKS = re.compile(r"[ \t\n\r]*")


def _members(text: str) -> dict[str, _Member]:
    """Return the members of a text that is a JSON object; of those of one name the first.

    Raises ``ValueError`` where it is none.
    """
    members: dict[str, _Member] = {}
    place, is_more = _after(text, 0, "{"), True
    if text[place : place + 1] == "}":
        place, is_more = place + 1, False
    while is_more:
        key, place = DECODER.raw_decode(text, place)
        if not isinstance(key, str):
            raise ValueError("has a key that is no text")
        begin = _after(text, place, ":")
        value, end = DECODER.raw_decode(text, begin)
        members.setdefault(key, _Member(value, begin, end))
        place = _blank_end(text, end)
        is_more = text[place : place + 1] == ","
        place = _after(text, place, "," if is_more else "}")
    if place != len(text):
        raise ValueError("has text after it")
    return members


def _after(text: str, place: int, sign: str) -> int:
    """Return the place after white space, a sign that must come, and more white space."""
    place = _blank_end(text, place)
    if not text.startswith(sign, place):
        raise ValueError(f"has no {sign} at {place}")
    return _blank_end(text, place + 1)


def _blank_end(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    return place if found is None else found.end()
