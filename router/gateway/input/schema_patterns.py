"""How many patterns of a JSON schema a text is to fit together.

llguidance makes one automaton of them, whose size each may double.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from router.gateway.input.schemas import target

MAX_APPLIED = 100_000
"""The most schemas that are looked at, once for each value that they apply to."""
_ALTERNATIVES = ("anyOf", "oneOf")
Schema = dict[str, Any]


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
