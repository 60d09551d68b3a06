"""What a JSON schema refers to, whether it has a finite instance, and how many patterns meet.

A schema that refers to itself without end has no instance. llguidance makes one automaton of
patterns that are met together, whose size each may double.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_MAX_DIGITS = 9
"""Of a place in a list; Python refuses to read very many."""
MAX_APPLIED = 100_000
"""The most schemas that are looked at, once for each value that they apply to."""
_ALTERNATIVES = ("anyOf", "oneOf")
Schema = dict[str, Any]


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
        elif isinstance(found, list) and key.isdecimal() and len(key) <= _MAX_DIGITS:
            found = found[int(key)] if int(key) < len(found) else None
        else:
            return None
    return found


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


def meet_too_many(root: object, num_patterns: int, most: int) -> bool:
    """Return whether a text is to fit more than ``most`` of a schema's ``num_patterns`` patterns.

    Too many where that takes long to find out. A reference to another document counts as all.
    """
    try:
        return num_patterns > most and _Values(root, num_patterns).any_meets(most)
    except RecursionError:
        return True


def own_patterns(schema: Schema) -> int:
    """Return how many patterns a schema has for its own text."""
    has_length = "minLength" in schema or "maxLength" in schema
    return ("pattern" in schema) + ("format" in schema) + has_length


class _Values:
    """The values of a schema, each with all the schemas that apply to it."""

    def __init__(self, root: object, num_patterns: int) -> None:
        self._root = root
        self._num_patterns = num_patterns
        self._num_met: dict[int, int] = {}
        """The patterns that a text which fits a schema, by its identity, is to fit."""

    def any_meets(self, most: int) -> bool:
        """Return whether any value is to fit more than ``most`` patterns."""
        left: list[list[Any]] = [[self._root]]
        seen: set[frozenset[int]] = set()
        num_applied = 0
        while left:
            schemas = left.pop()
            if sum(self._met(one) for one in {id(one): one for one in schemas}.values()) > most:
                return True
            applied = self._applied(schemas)
            key = frozenset(map(id, applied))
            num_applied += len(applied)
            if num_applied > MAX_APPLIED:
                return True
            if key not in seen:
                seen.add(key)
                left += _inner(applied)
        return False

    def _met(self, schema: object) -> int:
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._num_met:
            self._num_met[id(schema)] = 0  # within itself it is no other
            met = own_patterns(schema) + sum(map(self._met, self._together(schema)))
            for name in _ALTERNATIVES:
                met += max(map(self._met, _list(schema.get(name))), default=0)
            if "$ref" in schema and target(schema["$ref"], self._root) is None:
                met += self._num_patterns
            self._num_met[id(schema)] = met
        return self._num_met[id(schema)]

    def _together(self, schema: Schema) -> Iterator[object]:
        """Yield what applies to a value beside a schema."""
        yield from _list(schema.get("allOf"))
        if "$ref" in schema:
            yield target(schema["$ref"], self._root)

    def _applied(self, schemas: Sequence[object]) -> list[Schema]:
        """Return all that applies to a value, each of its alternatives too."""
        found: dict[int, Schema] = {}
        left = list(schemas)
        while left:
            schema = left.pop()
            if isinstance(schema, dict) and id(schema) not in found:
                found[id(schema)] = schema
                left += self._together(schema)
                for name in _ALTERNATIVES:
                    left += _list(schema.get(name))
        return list(found.values())


def _inner(applied: Sequence[Schema]) -> list[list[Any]]:
    """Return the schemas of each value within a value; of one that is an object, by its names.

    What applies to names that fit a pattern, and to all others, may apply to any name.
    """
    names: dict[str, list[Any]] = defaultdict(list)
    places: dict[int, list[Any]] = defaultdict(list)
    others: list[Any] = []
    items: list[Any] = []
    for schema in applied:
        others += _mapping(schema.get("patternProperties")).values()
        others.append(schema.get("additionalProperties"))
        items.append(schema.get("items"))
        for name, part in _mapping(schema.get("properties")).items():
            names[name].append(part)
        for place, part in enumerate(_list(schema.get("prefixItems"))):
            places[place].append(part)
    alone = [*names.values(), *places.values(), items]
    if len(applied) == 1:  # the patterns of one schema's names seldom fit the same name
        return [*alone, *([part] for part in others)]
    met = [[*parts, *others] for parts in names.values()]
    return [*met, others, items, *([*parts, *items] for parts in places.values())]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Schema:
    return value if isinstance(value, dict) else {}
