"""Forms that would take exponential time or memory are refused at once, and their like are not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from router.gateway.input.form_costs import MAX_TOGETHER, most_repeats
from router.gateway.input.grammar import check_grammar
from router.gateway.input.request.model import Generation

FIELD = "structured_outputs"
COUNT = MAX_TOGETHER + 1
PATTERNS = [{"pattern": f"a.{{{place}}}b"} for place in range(1, COUNT + 1)]
SEARCHES = [f"/(.|\\n)*a.{{{place}}}b(.|\\n)*/" for place in range(1, COUNT + 1)]
DOUBLED = "start: B0\n" + "\n".join(f'B{n}: B{n + 1} "a" & B{n + 1} "b"' for n in range(5))
NAMED = {f"n{place}": part for place, part in enumerate(PATTERNS)}
CHAINED = {
    f"n{place}": {**part, "$ref": f"#/$defs/n{place + 1}"} for place, part in enumerate(PATTERNS)
}
REPEATS, TOGETHER, MULTIPLE = "repeats a part", "patterns at once", "multipleOf"


def grammar_of(**form: Any) -> str:
    return check_grammar(Generation.model_validate({FIELD: form}), (0,))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", 1), ("abc", 1), ("a{3}", 3), ("a{3,}b{2,7}", 7), ("(a{10}b){10}", 100),
        ("((a{10}){10}c){10}", 1000), ("(a{10}|b{20}){2}", 40), ("[a{9}]{4}", 4), (r"a\{9}", 1),
        ("[]{9}]{2}", 2), ("(ab)*{5}", 5), ("{7", 1), ("a{ 30 }", 30), ("a{10}{20}", 200),
        ("(a{ 10 , 20 }){0003}", 60), ("(?:a{2}{3}){4}{5}?", 120), ("(?x)(a{10}) {20}", 200),
        ("a{10}b{20}", 20), ("a{99999999999999999999}", 10**9), (f"a{{{'0' * 5000}7}}", 7),
    ],
)  # fmt: skip
def test_counts_within_counts_are_multiplied(pattern: str, expected: int) -> None:
    assert most_repeats(pattern) == expected


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"regex": "(a{ 1000 }){ 1000 }"}, REPEATS),
        ({"regex": "a{1000}{1000}"}, REPEATS),
        ({"json": {"type": "string", "pattern": "^(a{ 1000 }){ 1000 }$"}}, REPEATS),
        ({"json": {"type": "object"}, "whitespace_pattern": "(a{999}){999}"}, REPEATS),
        ({"grammar": 'start: B\nB: C~1000\nC: D~9..1000\nD: "x"'}, REPEATS),
        ({"grammar": "start: B\nB: (C C){1000} # as often\nC: /a{1000}/"}, REPEATS),
        ({"grammar": 'root ::= b{1000}\nb ::= c{1000}\nc ::= "x"{1000}'}, REPEATS),
        ({"grammar": f"start: B\nB: {' & '.join(SEARCHES)}"}, TOGETHER),
        ({"grammar": f"start: B\nB: ~({' | ~'.join(SEARCHES)})"}, TOGETHER),
        ({"grammar": f'{DOUBLED}\nB5: "x"'}, TOGETHER),
        ({"json": {"multipleOf": 9999991.0}}, MULTIPLE),
        ({"json": {"multipleOf": 0.99999}}, MULTIPLE),
        ({"json": {"allOf": [{"multipleOf": 0.97}, {"multipleOf": 101.3}]}}, MULTIPLE),
        ({"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967.0}]}}, MULTIPLE),
        ({"json": {"allOf": PATTERNS}}, TOGETHER),
        ({"json": {"allOf": [{"properties": {"a": part}} for part in PATTERNS]}}, TOGETHER),
        ({"json": {"allOf": [{"items": part} for part in PATTERNS]}}, TOGETHER),
        ({"json": {"allOf": [{"anyOf": [part]} for part in PATTERNS]}}, TOGETHER),
        ({"json": {"allOf": [{"prefixItems": [part]} for part in PATTERNS]}}, TOGETHER),
        ({"json": {"allOf": [{"additionalProperties": part} for part in PATTERNS]}}, TOGETHER),
        ({"json": {"$ref": "#/$defs/n0", "$defs": CHAINED}}, TOGETHER),
        ({"json": {"allOf": [{"$ref": f"#/$defs/{n}"} for n in NAMED], "$defs": NAMED}}, TOGETHER),
        ({"json": {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"allOf": PATTERNS}}}}, TOGETHER),
    ],
)
def test_a_form_of_exponential_time_is_refused_at_once(form: dict[str, Any], reason: str) -> None:
    begun_at_s = time.process_time()
    with pytest.raises(InvalidRequestError, match=reason):
        grammar_of(**form)
    assert time.process_time() - begun_at_s < 1.0


def test_patterns_that_no_text_is_to_fit_together_are_taken() -> None:
    more = {f"m{place}": part for place, part in enumerate(PATTERNS)}
    schema = {
        "type": "object",
        "properties": {**NAMED, "one": {"anyOf": PATTERNS}, "again": {"$ref": "#/$defs/n3"}},
        "allOf": [{"properties": more}, {"$ref": "#/$defs/n4"}],
        "$defs": NAMED,
    }
    assert grammar_of(json=schema)
    rules = "\n".join(f"b{n}: B{n}\nB{n}: /a{{9}}/ & /a+/" for n in range(2 * COUNT))
    assert grammar_of(grammar=f"start: {' '.join(f'b{n}' for n in range(2 * COUNT))}\n{rules}")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: (B ","){100}\nB: C{100}\nC: "x{99999}" | /y{9}/  # {99999}\n',
        'start: a~50\na: "x" a | B  // & & &\nB: "&"',
        'root ::= b{100}\nb ::= "x"{100}',
        'start: a\na: b\nb: a "x" | "y"',
        "start: " + "r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(900)) + '\nr900: "x"',
    ],
)
def test_grammars_within_the_limits_are_taken(grammar: str) -> None:
    assert grammar_of(grammar=grammar)


@pytest.mark.parametrize("value", [1, 0.01, 2.5, 10_000, 1e-7, 9999.0, 0.3])
def test_multiples_of_few_digits_are_taken(value: float) -> None:
    assert grammar_of(json={"type": "number", "multipleOf": value})
