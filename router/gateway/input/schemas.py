"""What references in a JSON schema stand for, and whether it has a finite instance.

A schema that refers to itself without end has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_MAX_DIGITS = 9
"""Of a place in a list; Python refuses to read very many."""


def target(reference: object, root: object) -> Any:
    """Return what a reference within ``root`` stands for, ``None`` for any other."""
    if not isinstance(reference, str) or reference[:1] not in ("", "#"):
        return None  # of another document
    first, *parts = unquote(reference[1:]).split("/")
    if first:
        return None  # by an anchor
    found: Any = root
    for part in parts:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and _is_place(key) and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _is_place(key: str) -> bool:
    return key.isdecimal() and len(key) <= _MAX_DIGITS


def has_instance(schema: object, max_depth: int) -> bool:
    """Return whether a schema may have a finite instance, found without values.

    False for a schema that is nested, or refers to others, deeper than ``max_depth``. Only what
    must be there counts: required properties, the least number of items, and alternatives.
    Keywords that are not known here are taken for possible.
    """
    return _Search(schema, max_depth).finds_one()


class _Search:
    def __init__(self, root: object, max_depth: int) -> None:
        self._root = root
        self._max_depth = max_depth
        self._found: set[str] = set()
        """The references that have an instance."""
        self._failed_at: dict[str, int] = {}
        """The least depth at which each other reference of this round was followed."""

    def finds_one(self) -> bool:
        """Return whether the root has an instance: the least fixed point, found in rounds.

        A round follows no reference twice at a depth, and takes one that it follows already for
        one without an instance. So a round that finds no new reference is the last.
        """
        num_found = -1
        while len(self._found) > num_found:
            num_found = len(self._found)
            self._failed_at.clear()
            if self.may_end(self._root, 0):
                return True
        return False

    def may_end(self, schema: object, depth: int) -> bool:
        """Return whether a schema has an instance, as far as this round knows."""
        if not isinstance(schema, dict):
            return schema is not False
        if depth > self._max_depth:
            return False

        def ends(part: object) -> bool:
            return self.may_end(part, depth + 1)

        if not self._may_refer(schema.get("$ref"), depth):
            return False
        for name in ("anyOf", "oneOf"):
            options = schema.get(name)
            if isinstance(options, list) and options and not any(map(ends, options)):
                return False
        parts = schema.get("allOf")
        if isinstance(parts, list) and not all(map(ends, parts)):
            return False
        return self._may_fit(schema, ends)

    def _may_refer(self, reference: object, depth: int) -> bool:
        if not isinstance(reference, str) or reference in self._found:
            return True
        if depth >= self._failed_at.get(reference, depth + 1):
            return False
        found = target(reference, self._root)
        if found is None:  # llguidance says what is wrong with it
            return True
        self._failed_at[reference] = depth
        is_possible = self.may_end(found, depth + 1)
        if is_possible:
            self._found.add(reference)
        return is_possible

    def _may_fit(self, schema: dict[str, Any], ends: Any) -> bool:
        """Return whether an object or an array fits, or anything that is neither."""
        types = schema.get("type")
        kinds = types if isinstance(types, list) else [types]
        if any(kind not in ("object", "array", None) for kind in kinds):
            return True
        needs_object = kinds == ["object"] or (kinds == [None] and "properties" in schema)
        if needs_object:
            return self._object_may_fit(schema, ends)
        if kinds == ["array"]:
            return self._array_may_fit(schema, ends)
        if None in kinds:
            return True
        return self._object_may_fit(schema, ends) or self._array_may_fit(schema, ends)

    def _object_may_fit(self, schema: dict[str, Any], ends: Any) -> bool:
        required, properties = schema.get("required"), schema.get("properties")
        if not isinstance(required, list) or not isinstance(properties, dict):
            return True
        return all(
            ends(properties[name])
            for name in required
            if isinstance(name, str) and name in properties
        )

    def _array_may_fit(self, schema: dict[str, Any], ends: Any) -> bool:
        least = schema.get("minItems", 0)
        if not isinstance(least, int) or least <= 0:
            return True
        first = schema.get("prefixItems")
        ahead = first[:least] if isinstance(first, list) else []
        if not all(map(ends, ahead)):
            return False
        return len(ahead) >= least or ends(schema.get("items", True))
