"""The kinds of values that a schema allows, and the JSON of values written as plain text."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from router.gateway.input.schemas import target
from router.gateway.input.tools.reader import DECODER

TEXT = frozenset({"string"})
CONSTANTS = {"true": "boolean", "false": "boolean", "null": "null", "none": "null"}
"""Constants, which may have capitals: templates show those of earlier calls in Python's form."""
_BRANCHES = ("anyOf", "oneOf", "allOf")
_KINDS: Mapping[type, str] = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string",
    list: "array",
}  # fmt: skip


def kinds_of(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """Return JSON schema's names of the types that a schema allows, ``string`` where it tells none.

    ``root`` is the schema that references are within. Each part is read once, however many
    references lead to it.
    """
    kinds: set[str] = set()
    left, seen = [schema], set[int]()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if not isinstance(part, Mapping):
            kinds |= TEXT if part is not False else set()
        elif "$ref" in part:
            left.append(target(part["$ref"], root))
        elif "enum" in part or "const" in part:
            kinds |= {kind_of(value) for value in part.get("enum", [part.get("const")])}
        elif "type" in part:
            kinds |= {part["type"]} if isinstance(part["type"], str) else {*part["type"]}
        elif branches := [each for name in _BRANCHES for each in part.get(name, ())]:
            left += branches
        else:
            kinds |= TEXT
    return frozenset(kinds) or TEXT  # of a reference to itself there is none


def kind_of(value: object) -> str:
    """Return JSON schema's name of a value's type."""
    is_whole = isinstance(value, float) and value.is_integer()
    return "integer" if is_whole else _KINDS.get(type(value), "object")


def is_of(value: object, kinds: Collection[str]) -> bool:
    """Return whether a value is of some of the ``kinds``."""
    kind = kind_of(value)
    return kind in kinds or (kind == "integer" and "number" in kinds)


def json_of(text: str, kinds: frozenset[str]) -> str:
    """Return the JSON of a value of some of the ``kinds``.

    What is JSON of another kind than a text stays as the model wrote it. What is of no kind that is
    allowed becomes a text, as a call may have arguments that its schema does not allow.
    """
    plain = text.strip()
    constant = plain.lower()
    if constant in CONSTANTS:
        is_allowed = CONSTANTS[constant] in kinds
        return constant.replace("none", "null") if is_allowed else as_text(text)
    try:
        value = DECODER.decode(plain)
    except (ValueError, RecursionError):
        return as_text(text)
    return plain if is_of(value, kinds) and not isinstance(value, str) else as_text(text)


def as_text(text: str) -> str:
    """Return a text as JSON."""
    return json.dumps(text, ensure_ascii=False)
