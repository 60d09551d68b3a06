"""Bounds of forms that take long, which the limits of llguidance 1.9.1 do not bound.

A repetition of a repetition, numbers that are multiples of others, patterns of names that overlap,
and patterns that one text is to fit make automata whose size is the product of their parts.
Patterns are slow in the gateway's check. Counts and multiples pass it in no time, and then hold the
router's matcher.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from router.gateway.input.schema_patterns import meet_too_many, own_patterns

MAX_REPEATS = 100_000
"""The most repetitions of one part of a pattern, those around it counted in."""
MAX_MULTIPLE = 10_000
"""The largest common multiple of all numbers in ``multipleOf``, without its point."""
MAX_PATTERNS = 32
"""The most patterns of names in one object."""
MAX_TOGETHER = 8
"""The most patterns that one text is to fit together: each may double the size of an automaton."""
_QUANTIFIER = re.compile(r"\s*\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


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
