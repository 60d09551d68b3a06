"""The kinds of values that a schema allows, and the JSON of values written as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from router.gateway.schemas import target
from router.gateway.tools.calls import DECODER

TEXT = frozenset({"string"})
_CONSTANTS = {"true": "boolean", "false": "boolean", "null": "null", "none": "null"}
"""Constants, which may have capitals: templates show those of earlier calls in Python's form."""


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
        named, branches = _named_kinds(part, root)
        kinds |= named
        left += branches
    return frozenset(kinds) or TEXT  # of a reference to itself there is none


class ParameterKinds:
    """The kinds of the parameters of tools, found once for each: a schema may be large."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._found: dict[tuple[str, str], frozenset[str]] = {}

    def of(self, tool: str, key: str) -> frozenset[str]:
        """Return the kinds of a parameter, those of a text where it is unknown."""
        schema = self._schemas.get(tool, {})
        properties = schema.get("properties", {})
        if key not in properties:  # not kept: a model may write any number of them
            return TEXT
        if (tool, key) not in self._found:
            self._found[tool, key] = kinds_of(properties[key], schema)
        return self._found[tool, key]


def _named_kinds(schema: object, root: Mapping[str, Any]) -> tuple[frozenset[str], list[object]]:
    """Return the types that a schema names itself, and the schemas that it leaves them to."""
    if not isinstance(schema, Mapping):
        return TEXT if schema is not False else frozenset(), []
    if "$ref" in schema:
        return frozenset(), [target(schema["$ref"], root)]
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return frozenset(kind_of(value) for value in values), []
    if "type" in schema:
        given = schema["type"]
        return frozenset([given] if isinstance(given, str) else given), []
    branches = [each for name in ("anyOf", "oneOf", "allOf") for each in schema.get(name, ())]
    return (frozenset(), branches) if branches else (TEXT, [])


def kind_of(value: object) -> str:
    """Return JSON schema's name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    names = ((float, "number"), (str, "string"), (list, "array"))
    return next((name for each, name in names if isinstance(value, each)), "object")


def json_of(text: str, kinds: frozenset[str]) -> str:
    """Return the JSON of a value of some of the ``kinds``.

    What is JSON of another kind than a text stays as the model wrote it. What is of no kind that is
    allowed becomes a text, as a call may have arguments that its schema does not allow.
    """
    plain = text.strip()
    constant = plain.lower()
    if constant in _CONSTANTS:
        is_allowed = _CONSTANTS[constant] in kinds
        return constant.replace("none", "null") if is_allowed else as_text(text)
    try:
        kind = kind_of(DECODER.decode(plain))
    except (ValueError, RecursionError):
        return as_text(text)
    is_allowed = kind in kinds or (kind == "integer" and "number" in kinds)
    return plain if is_allowed and kind != "string" else as_text(text)


def as_text(text: str) -> str:
    """Return a text as JSON."""
    return json.dumps(text, ensure_ascii=False)
