"""Bounds of forms that take long, which the limits of llguidance 1.9.1 do not bound.

A repetition of a repetition, numbers that are multiples of others, patterns of names that overlap,
and patterns that one text is to fit make automata whose size is the product of their parts.
Patterns are slow in the gateway's check. Counts and multiples pass it in no time, and then hold the
router's matcher.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from router.gateway.input.schemas import meet_too_many, own_patterns

MAX_REPEATS = 100_000
"""The most repetitions of one part of a pattern, those around it counted in."""
MAX_MULTIPLE = 10_000
"""The largest common multiple of all numbers in ``multipleOf``, without its point."""
MAX_PATTERNS = 32
"""The most patterns of names in one object."""
MAX_TOGETHER = 8
"""The most patterns that one text is to fit together: each may double the size of an automaton."""
_QUANTIFIER = re.compile(r"\s*\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")
_TOKEN = re.compile(
    r"""(?P<comment>(?:\#|//)[^\n]*)
    | (?P<text>"(?:\\.|[^"\\])*")
    | (?P<regex>/(?:\\.|[^/\\])+/[a-z]*)
    | (?P<repeat>~\s*(?P<least>\d+)(?:\s*\.\.\s*(?P<most>\d+))?
        | \{\s*(?P<from>\d+)\s*(?:,\s*(?P<to>\d*)\s*)?\})
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<line>\n)
    | (?P<mark>[():&~\[\]])""",
    re.VERBOSE | re.DOTALL,
)


def most_repeats(pattern: str) -> int:
    """Return how often a part of a pattern is repeated at most, by counts within counts.

    ``*`` and ``+`` count once: they go back to where they began. White space before a count is left
    out, as a pattern may ask for.
    """
    around, last, place = [1], 1, 0
    while place < len(pattern):
        char = pattern[place]
        if found := _QUANTIFIER.match(pattern, place):
            last *= count_of(found[2] or found[1])
            place = found.end()
        elif char == "\\":
            last, place = 1, place + 2
        elif char == "[":
            last, place = 1, _class_end(pattern, place)
        elif char == ")" and len(around) > 1:
            last, place = around.pop(), place + 1
        else:
            if char == "(":
                around.append(1)
            # More than one quantifier may follow a part, with white space between them.
            last, place = last if char in "*+?" or char.isspace() else 1, place + 1
        around[-1] = max(around[-1], last)
    return max(around)


def count_of(digits: str) -> int:
    """Return the number of a quantifier; one of many digits is large enough to be refused."""
    return int(found or 1) if len(found := digits.lstrip("0")) <= 9 else 10**9


def _class_end(pattern: str, place: int) -> int:
    """Return the place after a class of characters."""
    place += 2 if pattern[place + 1 : place + 2] == "^" else 1
    place += pattern[place : place + 1] == "]"
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1


def schema_fault(schema: object) -> str:
    """Return why a schema takes too long to compile, empty where it does not."""
    multiples, num_patterns = Fraction(1), 0
    for part in mappings(schema):
        value = part.get("multipleOf")
        if isinstance(value, int | float) and 0 < value < math.inf:
            exact = Fraction(value) if isinstance(value, int) else Fraction(repr(value))
            multiples = _common_multiple(multiples, exact)
        if _digits_of(multiples) > MAX_MULTIPLE:
            return f"multipleOf: the least common multiple is over {MAX_MULTIPLE}"
        patterns = part.get("patternProperties")
        if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
            return f"patternProperties: has {len(patterns)} patterns; at most {MAX_PATTERNS}"
        named = patterns if isinstance(patterns, dict) else {}
        for pattern in (part.get("pattern"), *named):
            if isinstance(pattern, str) and most_repeats(pattern) > MAX_REPEATS:
                return f"a pattern repeats a part more than {MAX_REPEATS} times"
        num_patterns += own_patterns(part)
    if meet_too_many(schema, num_patterns, MAX_TOGETHER):
        return f"a string must match more than {MAX_TOGETHER} patterns at once"
    return ""


def _common_multiple(one: Fraction, other: Fraction) -> Fraction:
    """Return the least number that is a multiple of both."""
    return Fraction(
        math.lcm(one.numerator, other.numerator), math.gcd(one.denominator, other.denominator)
    )


def _digits_of(number: Fraction) -> int:
    """Return the digits of a decimal number as a whole number: 25 of 2.5."""
    digits = number.numerator
    rest = number.denominator
    while rest % 10 == 0:
        rest //= 10
    while rest > 1:
        factor = 5 if rest % 2 == 0 else 2
        digits, rest = digits * factor, rest * factor // 10
    return digits


def mappings(schema: object) -> Iterator[dict[str, Any]]:
    """Yield all mappings of a schema, without recursion."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)


class _Cost(NamedTuple):
    repeats: int = 1
    """How often a part is repeated at most, by counts within counts."""
    together: int = 0
    """How many marks there are between patterns that one text is to fit, or before one that it is
    not to fit."""


_Definitions = Mapping[str, list[tuple[str, str]]]
"""The kinds and texts of the tokens of each name's definition."""


def lark_fault(text: str) -> str:
    """Return why a grammar of llguidance's Lark takes too long, empty where it does not."""
    definitions = _definitions(text)
    for cost in _costs(definitions).values():
        if cost.repeats > MAX_REPEATS:
            return f"repeats a part more than {MAX_REPEATS} times"
        if cost.together >= MAX_TOGETHER:  # marks, of which there is one fewer than patterns
            return f"a string must match more than {MAX_TOGETHER} patterns at once"
    return ""


def _definitions(text: str) -> _Definitions:
    found: dict[str, list[tuple[str, str]]] = {}
    tokens: list[tuple[str, str]] = found.setdefault("", [])
    line: int | None = 0
    """Where the tokens of the line begin, if no colon has come in it."""
    for kind, value in _tokens(text):
        if kind == "line":
            line = len(tokens)
        elif value != ":":
            tokens.append((kind, value))
        elif line is not None and tokens[line:]:
            name = tokens[line][1]
            del tokens[line:]
            tokens, line = found.setdefault(name, []), None
    return found


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    for found in _TOKEN.finditer(text):
        kind = str(found.lastgroup)
        if found["repeat"]:
            yield "repeat", found["to"] or found["from"] or found["most"] or found["least"]
        elif kind != "comment":
            yield kind, found[0]


def _costs(definitions: _Definitions) -> dict[str, _Cost]:
    """Return each name's cost, without recursion: a chain of names may be long.

    A name within itself counts once: it goes back to where it began.
    """
    costs: dict[str, _Cost] = {}
    for first in definitions:
        left = [first]
        while left:
            name = left[-1]
            costs.setdefault(name, _Cost())
            inner = (value for kind, value in definitions[name] if kind == "name")
            new = [each for each in inner if each in definitions and each not in costs]
            if new:
                left.extend(dict.fromkeys(new))
            else:
                costs[name] = _cost(name, definitions[name], costs)
                left.pop()
    return costs


def _cost(name: str, tokens: list[tuple[str, str]], costs: Mapping[str, _Cost]) -> _Cost:
    around, last, marks, inner = [1], 1, 0, [0]
    for kind, value in tokens:
        if kind == "repeat":
            last = min(last * count_of(value), MAX_REPEATS + 1)
        elif value in ("(", "["):
            around.append(1)
            last = 1
        elif value in (")", "]") and len(around) > 1:
            last = around.pop()
        elif kind == "name":
            cost = costs.get(value, _Cost())
            last = cost.repeats
            inner.append(cost.together)
        else:
            marks += value in ("&", "~")
            last = most_repeats(value) if kind == "regex" else 1
        around[-1] = max(around[-1], last)
    # Rules are no patterns, and those of one rule are not met together.
    is_rule = name.lstrip("_")[:1].islower()
    together = marks + (max(inner) if is_rule else sum(inner))
    return _Cost(max(around), min(together, MAX_TOGETHER))
