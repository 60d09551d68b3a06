"""Bounds of forms whose compilation takes long, which llguidance's own limits do not bound.

A repetition of a repetition, numbers that are multiples of others, and patterns of names that
overlap make automata whose size is the product of their parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

MAX_REPEATS = 100_000
"""The most repetitions of one part of a pattern, those around it counted in."""
MAX_MULTIPLE = 10_000
"""The largest common multiple of all integers in ``multipleOf``."""
MAX_PATTERNS = 32
"""The most patterns of names in one object."""
_QUANTIFIER = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")


def most_repeats(pattern: str) -> int:
    """Return how often a part of a pattern is repeated at most, by counts within counts.

    ``*`` and ``+`` count once: they go back to where they began.
    """
    most, around, place = 1, [1], 0
    while place < len(pattern):
        char = pattern[place]
        found = _QUANTIFIER.match(pattern, place)
        if char == "\\":
            place += 2
            continue
        if char == "[":
            place = _class_end(pattern, place)
            around[-1] = max(around[-1], 1)
            continue
        if char == "(":
            around.append(1)
        elif char == ")" and len(around) > 1:
            inner = around.pop()
            count, place = _count_at(pattern, place + 1)
            around[-1] = max(around[-1], inner * count)
            most = max(most, around[-1])
            continue
        elif found:
            around[-1] = max(around[-1], int(found[2] or found[1]))
            place = found.end()
            most = max(most, *around)
            continue
        place += 1
    return most


def _count_at(pattern: str, place: int) -> tuple[int, int]:
    """Return the count of a quantifier at a place, and the place after it."""
    found = _QUANTIFIER.match(pattern, place)
    return (1, place) if found is None else (int(found[2] or found[1]), found.end())


def _class_end(pattern: str, place: int) -> int:
    """Return the place after a class of characters."""
    place += 2 if pattern[place + 1 : place + 2] == "^" else 1
    place += pattern[place : place + 1] == "]"
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1


def schema_fault(schema: object) -> str:
    """Return why a schema takes too long to compile, empty where it does not."""
    multiples = 1
    for part in _mappings(schema):
        value = part.get("multipleOf")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            multiples = math.lcm(multiples, value)
        if multiples > MAX_MULTIPLE:
            return f"multipleOf: the common multiple of all is over {MAX_MULTIPLE}"
        patterns = part.get("patternProperties")
        if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
            return f"patternProperties: has {len(patterns)} patterns; at most {MAX_PATTERNS}"
        named = patterns if isinstance(patterns, dict) else {}
        for pattern in (part.get("pattern"), *named):
            if isinstance(pattern, str) and most_repeats(pattern) > MAX_REPEATS:
                return f"a pattern repeats a part more than {MAX_REPEATS} times"
    return ""


def _mappings(schema: object) -> Iterator[dict[str, Any]]:
    """Yield all mappings of a schema, without recursion."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
