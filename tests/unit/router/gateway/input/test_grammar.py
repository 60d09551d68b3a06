"""The form of an answer as clients ask for it: the same grammar on every surface, or a refusal."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from cluster.errors import InvalidRequestError
from router.client import Client, Sampling
from router.config import grammar_limits
from router.gateway.input.grammar import MAX_DEPTH, MAX_GRAMMAR_BYTES
from router.gateway.input.schemas import has_instance, target
from tests.unit import http_calls
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says
from tests.unit.http_calls import call, chat, completion, refusal

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
UPSTREAM = FakeUpstream(says(" was"))
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "json as text": {"json": json.dumps(SCHEMA)},
    "regex": {"regex": "[a-z]+"},
    "choice": {"choice": ["a", 'b "quoted"', "🚀", "back\\slash\n"]},
    "lark": {"grammar": 'start: "a" | "b"'},
    "lark with marks": {"grammar": '\n  ?start: letter\n  !letter: "a" | "b"'},
    "gbnf": {"grammar": 'root ::= "a" | "b"'},
    "json_object": {"json_object": True},
    "compact": {"json": SCHEMA, "disable_any_whitespace": True},
    "spaced": {"json": SCHEMA, "whitespace_pattern": " ?"},
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with grpc_server(UPSTREAM) as address, Client(address) as connected:
        yield connected


def last_grammar() -> str:
    return UPSTREAM.requests[-1].sampling.grammar


@pytest.mark.parametrize("name", FORMS)
def test_every_surface_brings_the_same_grammar(client: Client, name: str) -> None:
    form = FORMS[name]
    client.generate("in", Sampling(structured_outputs=form))
    of_grpc = last_grammar()
    assert of_grpc
    for ask in (completion, chat):
        assert ask(UPSTREAM, structured_outputs=form).status_code == 200
        assert last_grammar() == of_grpc


def test_openais_formats_are_schemas() -> None:
    for format_, form in (
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
    ):
        assert chat(UPSTREAM, response_format=format_).status_code == 200
        of_format = last_grammar()
        assert completion(UPSTREAM, structured_outputs=form).status_code == 200
        assert of_format == last_grammar() != ""


def test_what_asks_for_no_form_is_no_grammar() -> None:
    for given in (
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json_object": False}},
        {"response_format": None, "structured_outputs": None},
    ):
        assert chat(UPSTREAM, **given).status_code == 200
        assert last_grammar() == ""


ENDLESS = {"type": "array", "items": {"$ref": "#"}, "minItems": 1}
DEEP: dict[str, Any] = {}
for _ in range(MAX_DEPTH + 2):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}
MANY_PATTERNS = {"patternProperties": {f"a{n}.*": {} for n in range(33)}}
OF = "structured_outputs"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, OF, "must have exactly one of"),
    ({"json": SCHEMA, "regex": "a"}, OF, "must have exactly one of"),
    ({"jason": SCHEMA}, f"{OF}.jason", "unknown field"),
    ({"json": 5}, f"{OF}.json", "a JSON schema"),
    ({"json": "{"}, f"{OF}.json", "is not JSON"),
    ({"json": {"type": "foo"}}, f"{OF}.json", "Invalid type: foo"),
    ({"json": {"not": {}}}, f"{OF}.json", '"not"'),
    ({"json": {"type": "object", "properties": {}, "required": [[]]}}, f"{OF}.json", "required"),
    ({"json": {"type": "array", "uniqueItems": True}}, f"{OF}.json", "uniqueItems"),
    ({"json": {"type": "string", "format": "nope"}}, f"{OF}.json", "nope"),
    ({"json": {"$ref": "#/nowhere"}}, f"{OF}.json", "nowhere"),
    ({"json": {"$ref": "http://127.0.0.1:1/x"}}, f"{OF}.json", "127.0.0.1"),
    ({"json": {"$ref": "#"}}, f"{OF}.json", "no finite instance"),
    ({"json": ENDLESS}, f"{OF}.json", "no finite instance"),
    ({"json": DEEP}, f"{OF}.json", "deeper than"),
    ({"json": {"x-guidance": {"lenient": True}}}, f"{OF}.json.x-guidance", "not supported"),
    ({"json": {"enum": ["x" * MAX_GRAMMAR_BYTES]}}, f"{OF}.json", "is larger than"),
    ({"json": {"const": "\ud800"}}, f"{OF}.json", "half of a surrogate pair"),
    ({"json": {"properties": {"\ud800": {}}}}, f"{OF}.json", "half of a surrogate pair"),
    ({"json": {"minimum": 10**400}}, f"{OF}.json", "not JSON serializable"),
    ({"regex": "a["}, f"{OF}.regex", "regex"),
    ({"regex": "(?=a)b"}, f"{OF}.regex", "look-around"),
    ({"regex": ""}, f"{OF}.regex", "at least 1"),
    ({"regex": "((a{1000}){1000})"}, f"{OF}.regex", "repeats a part"),
    ({"json": MANY_PATTERNS}, f"{OF}.json", "patternProperties"),
    ({"grammar": 'start: %json {"$ref": "#"}'}, f"{OF}.grammar", "%json"),
    ({"choice": []}, f"{OF}.choice", "at least 1"),
    ({"choice": ["a", ""]}, f"{OF}.choice[1]", "at least 1"),
    ({"choice": ["a"] * 1025}, f"{OF}.choice", "at most 1024"),
    ({"grammar": "start: nothing"}, f"{OF}.grammar", "nothing"),
    ({"grammar": "root ::= ("}, f"{OF}.grammar", ""),
    ({"regex": "a", "disable_any_whitespace": True}, f"{OF}.regex", "only with json"),
]


@pytest.mark.parametrize(("form", "field", "told"), BAD)
def test_forms_are_refused(client: Client, form: dict[str, Any], field: str, told: str) -> None:
    before = len(UPSTREAM.requests)
    body = {"model": "tiny", "prompt": "in", "structured_outputs": form}
    said = refusal(call(UPSTREAM, http_calls.COMPLETIONS, body), 400, field)
    assert told in said
    kinds = [kind for kind in form if kind in ("json", "regex", "choice", "grammar")]
    if len(kinds) == 1 and form.get("json") != 5:  # gRPC has no place for the others
        with pytest.raises(InvalidRequestError) as caught:
            client.generate("in", Sampling(structured_outputs=form), model="tiny")
        assert caught.value.field == f"sampling.{field}"
        assert said == f"{field}: {caught.value.message}"
    assert len(UPSTREAM.requests) == before


def schema_form(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (schema_form(schema=1), "response_format.json_schema.schema"),
        *(
            (schema_form(schema=SCHEMA, **{name: 5}), f"response_format.json_schema.{name}")
            for name in ("name", "description", "strict")
        ),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_object"}, OF: {"regex": "a"}}, OF),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_formats_are_refused_by_name(given: dict[str, Any], field: str) -> None:
    refusal(chat(UPSTREAM, **given), 400, field)


TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
            "required": ["left"],
        }
    },
    "$ref": "#/$defs/tree",
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, True),
        (True, True),
        (False, False),
        (TREE, True),
        ({"properties": {"a": {"$ref": "#"}}}, True),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        (ENDLESS, False),
        ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 1}, True),
        ({"type": "array", "prefixItems": [False], "minItems": 1}, False),
        ({"allOf": [{}, {"$ref": "#"}]}, False),
        ({"anyOf": [{"$ref": "#"}, {"type": "string"}]}, True),
        ({"$ref": "#/$defs/a%25~1b", "$defs": {"a%/b": {"type": "null"}}}, True),
        ({"$ref": "elsewhere"}, True),
        ({"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor", "type": "null"}}}, True),
        ({"$defs": {"a": False}, "$ref": "#/$defs/a"}, False),
        ({"items": {"$ref": "#anchor"}, "type": "array", "minItems": 1}, True),
    ],
)
def test_a_schema_has_a_finite_instance_or_not(schema: Any, expected: bool) -> None:
    assert has_instance(schema, MAX_DEPTH) is expected


@pytest.mark.parametrize(("kind", "has_one"), [("allOf", True), ("anyOf", False)])
def test_the_search_for_an_instance_ends_soon(kind: str, has_one: bool) -> None:
    """Each definition refers to the next one twice, so that a plain walk takes 2**40 steps."""
    definitions: dict[str, Any] = {
        f"d{n}": {kind: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)
    }
    definitions["d40"] = {"type": "null"} if has_one else {"$ref": "#/$defs/d40"}
    assert has_instance({"$ref": "#/$defs/d0", "$defs": definitions}, MAX_DEPTH) is has_one


def test_instances_are_those_of_a_plain_search() -> None:
    """Against the definition: what has an instance is found from what has one already."""
    random = Random(1)
    for _ in range(300):
        names = [f"d{n}" for n in range(random.randint(1, 6))]
        parts = {name: random.choices([*names, "null"], k=random.randint(1, 3)) for name in names}
        kinds = {name: random.choice(["anyOf", "allOf"]) for name in names}
        known = {"null"}
        for _ in names:
            known |= {
                name
                for name in names
                if (any if kinds[name] == "anyOf" else all)(part in known for part in parts[name])
            }
        definitions: dict[str, Any] = {
            name: {kinds[name]: [{"$ref": f"#/$defs/{part}"} for part in parts[name]]}
            for name in names
        }
        definitions["null"] = {"type": "null"}
        for name in names:
            schema = {"$ref": f"#/$defs/{name}", "$defs": definitions}
            assert has_instance(schema, MAX_DEPTH) is (name in known)


RULES = "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(4000)) + 'a4000: "x"\n'
DEFINITIONS = {f"{n:x}": {"items": {"$ref": f"#/$defs/{n + 1:x}"}} for n in range(1500)}
CHAIN = {"$ref": "#/$defs/0", "$defs": {**DEFINITIONS, f"{1500:x}": {"type": "null"}}}


@pytest.mark.parametrize("form", [{"grammar": RULES}, {"json": CHAIN}])
def test_a_long_chain_of_rules_or_references_ends_no_process(form: dict[str, Any]) -> None:
    """Its compilation needs more than the usual stack of 8 MiB."""
    assert completion(UPSTREAM, structured_outputs=form).status_code == 200
    assert last_grammar()


def test_checks_at_once_have_large_stacks_and_leave_the_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_size, sizes = threading.stack_size, []
    usual = set_size()

    def noted(size: int) -> int:
        before = set_size(size)
        sizes.append(size)
        time.sleep(0.001)  # a chance for another to come between
        return before

    monkeypatch.setattr(grammar_limits.threading, "stack_size", noted)
    with ThreadPoolExecutor(16) as many:
        pools = list(many.map(lambda _: grammar_limits.grammar_pool(), range(32)))
    for pool in pools:
        pool.shutdown()
    assert sizes == [grammar_limits.STACK_BYTES, usual] * 32
    assert set_size() == usual


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
