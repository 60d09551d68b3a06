"""Bounds of grammars whose compilation takes long: a name counts as all that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from router.gateway.input.form_costs import MAX_REPEATS, MAX_TOGETHER, count_of, most_repeats

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
