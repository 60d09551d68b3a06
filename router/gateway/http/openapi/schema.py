"""Small JSON schemas (draft 2020-12), of which the OpenAPI document is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
BOOLEAN: Schema = {"type": "boolean"}


def text(least: int = 0, **more: object) -> Schema:
    """Return the schema of a text of ``least`` characters or more."""
    return {"type": "string", **({"minLength": least} if least else {}), **more}


def integer(low: int, high: int | None = None) -> Schema:
    """Return the schema of an integer from ``low`` to ``high``."""
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def items(of: Schema, least: int = 0) -> Schema:
    """Return the schema of a list of ``least`` entries or more."""
    return {"type": "array", "items": of, **({"minItems": least} if least else {})}


def one_of(*values: object) -> Schema:
    """Return the schema of some values."""
    return {"enum": list(values)}


def either(*schemas: Schema) -> Schema:
    """Return the schema of what fits one of several."""
    return {"anyOf": list(schemas)}


def record(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """Return the schema of an object with no fields beside ``properties``."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def answer(**properties: Schema) -> Schema:
    """Return the schema of an object that has all of these fields, and no other."""
    return record(properties, list(properties))


def ref(name: str) -> Schema:
    """Return the reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}
