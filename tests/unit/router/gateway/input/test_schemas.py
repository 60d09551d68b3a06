"""What references in a schema stand for."""

from __future__ import annotations

from typing import Any

import pytest
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from router.gateway.input.schemas import has_instance, target

ROOT: dict[str, Any] = {
    "$defs": {
        "x y": {"const": 1}, "é": {"const": 2}, "a/b": {"const": 3}, "a~b": {"const": 4},
        "~1": {"const": 5}, "a%b": {"const": 6}, "": {"const": 7},
        "l": {"anyOf": [{"const": 8}, {"const": 9}]}, "0": {"const": 10},
    }
}  # fmt: skip


@pytest.mark.parametrize(
    "reference",
    [
        "", "#", "#/$defs/x%20y", "#/$defs/%C3%A9", "#/$defs/a~1b", "#/$defs/a%7E1b",
        "#/$defs/a%2Fb", "#/$defs/a~0b", "#/$defs/~01", "#/$defs/a%25b", "#/$defs/",
        "#/$defs/l/anyOf/0", "#/$defs/l/anyOf/1", "#/$defs/l%2FanyOf%2F1", "#/%24defs/0",
        "#/$defs/l/anyOf/2", "#/$defs/l/anyOf/0/", "#/$defs/none", "#/", "#anchor", "%23/$defs/0",
        "other.json", "other.json#/$defs/0",
    ],
)  # fmt: skip
def test_references_stand_for_what_the_referencing_library_finds(reference: str) -> None:
    resource = DRAFT202012.create_resource(ROOT)
    resolver = Registry().with_resource("", resource).resolver()
    try:
        expected = resolver.lookup(reference).contents
    except Unresolvable:
        expected = None
    assert target(reference, ROOT) is expected


@pytest.mark.parametrize("reference", ["#/allOf/" + "9" * 5000, "#/allOf/-1", "#/allOf/x", 5])
def test_a_reference_to_no_place_of_a_list_is_not_found(reference: object) -> None:
    schema = {"allOf": [{"type": "null"}], "$ref": reference}
    assert target(reference, schema) is None
    assert has_instance(schema, 10)
