"""Grammars of calls: what they allow parses into valid calls, in each family's format."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from cluster.errors import InvalidRequestError
from router.config.grammar_limits import parser_limits
from router.gateway.input.grammar import check_whole
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.grammars import grammar_of
from tests.unit.gateway_fakes import FakeUpstream
from tests.unit.http_calls import refusal
from tests.unit.router.gateway.input.tools.answers import parsed, tool
from tests.unit.router.gateway.input.tools.chat_models import EOS, SPECIAL, model, says
from tests.unit.router.gateway.input.tools.test_parsers import CASES
from tests.unit.router.gateway.input.tools.test_refusals import TOOL, post

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FLAG: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"$ref": "#/$defs/flag"}},
    "required": ["on"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
TOOLS = (tool("get_weather", PLACE, True), tool("get", FLAG))
SCHEMAS = {"get_weather": PLACE, "get": FLAG}
NAMES = [name for name in SPECIAL if name != "plain"]
FORM = json.dumps({"grammars": [{"name": "json_schema", "json_schema": FLAG}]})


def vocabulary(name: str) -> LLTokenizer:
    return model(name).tokenizer.vocabulary(320, (EOS,))


def written(name: str, use: ToolUse, seed: int, form: str = "") -> str:
    """A text that a model with random logits writes under a grammar; it ends where it can."""
    tokens, chance = vocabulary(name), random.Random(seed)
    chat_format = model(name).tokenizer.chat_format
    grammar = grammar_of(chat_format, use, "", form)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())
    assert not matcher.is_error(), matcher.get_error()
    special = set(chat_format.tokens.values())
    bits = allocate_token_bitmask(1, tokens.vocab_size)
    ids: list[int] = []
    while len(ids) < 2000:
        fill_next_token_bitmask(matcher, bits)
        allowed = [i for i in range(tokens.vocab_size) if bits[0, i // 32] >> (i % 32) & 1]
        known = [i for i in allowed if i in special or not tokens.is_special_token(i)]
        if matcher.is_accepting() and (not known or chance.random() < 0.3):
            return model(name).tokenizer.whole_text(ids)
        # Marks come rarely among all tokens.
        marks = [i for i in known if i in special]
        ids.append(chance.choice(marks if marks and chance.random() < 0.2 else known))
        assert matcher.consume_token(ids[-1])
    raise AssertionError("the answer has no end")


def takes(name: str, grammar: str, text: str) -> bool:
    matcher = LLMatcher(vocabulary(name), grammar, log_level=0)
    ids = model(name).tokenizer.encode(text, add_special_tokens=False)
    return all(map(matcher.consume_token, ids)) and matcher.is_accepting()


def of_strict(name: str, tools: Any, is_required: bool = False, prompt: str = "") -> str:
    chat_format = model(name).tokenizer.chat_format
    return grammar_of(chat_format, ToolUse(tools, tools, is_required), prompt, "")


def checked_calls(name: str, text: str, use: ToolUse) -> list[tuple[str, str]]:
    whole = parsed(model(name).tokenizer.chat_format, [text], True, use, "")
    for called, arguments in whole.calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[called])
    return whole.calls


@pytest.mark.parametrize("name", NAMES)
def test_required_calls_are_always_valid(name: str) -> None:
    for seed in range(6):
        use = ToolUse(TOOLS, TOOLS[seed % 2 :], True, seed % 3 != 0)
        calls = checked_calls(name, written(name, use, seed), use)
        assert calls
        assert seed % 2 == 0 or {called for called, _ in calls} == {"get"}
        assert seed % 3 or len(calls) == 1


@pytest.mark.parametrize("name", ["qwen", "deepseek-v3"])
def test_reasoning_that_the_prompt_opens_comes_first(name: str) -> None:
    grammar = of_strict(name, TOOLS, True, "<think>\n")
    call = CASES[name][1].replace('"Paris"}', '"P","days":[1]}')
    assert takes(name, grammar, f"Hm.\n</think>\n\n{call}")
    assert not takes(name, grammar, call)


@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_allow_any_text_and_valid_calls_alone(name: str) -> None:
    use, grammar = ToolUse(TOOLS, TOOLS), of_strict(name, TOOLS)
    text = '<|channel|>final<|message|>It is "{[ fine.' if name == "gpt-oss" else 'It is "{[ fine.'
    case = {key: case[1] for key, case in CASES.items()}[name.replace("qwen3-coder", "coder")]
    good = case.replace('"Paris"}', '"P","days":[1]}').partition("[TOOL_CALLS]now")[0]
    good = good.replace("\nParis\n<", "\nP\n</parameter>\n<parameter=days>\n[1]\n<")
    good = good.split(', {"name": "now"')[0] + "]" if name == "mixtral" else good
    for asked, fits in ((text, True), (good, True), (case, False)):
        # The mark of an end is the published model's own.
        assert takes(name, grammar, asked.removesuffix("<|call|>")) == fits, asked
    for seed in range(3):
        checked_calls(name, written(name, use, seed), use)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_response_format_an_answer_is_calls_or_of_the_form(name: str) -> None:
    use = ToolUse(TOOLS, TOOLS)
    kinds = set()
    for seed in range(12):
        text = written(name, use, seed, FORM)
        whole = parsed(model(name).tokenizer.chat_format, [text], True, use)
        kinds.add(bool(whole.calls))
        if not whole.calls:
            jsonschema.validate(json.loads(whole.content), FLAG)
    assert kinds == {True, False}


DATE = {"type": "string", "format": "date"}
SHORT = {"type": "string", "maxLength": 3}
PLAIN_VALUES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "sized": {"type": "string", "minLength": 2, "maxLength": 4},
        "matched": {"type": "string", "pattern": "^[ab]{2,3}/?$"},
        "within": {"type": "string", "pattern": "x|yz", "maxLength": 5},
        "maybe": {"type": ["string", "null"], "maxLength": 3, "description": "a note"},
        "either": {"anyOf": [SHORT, {"type": "integer", "minimum": 10, "maximum": 99}]},
        "listed": {"enum": ["x", 1, "1", None, "null", "a\nb"]},
        "flag": {"$ref": "#/$defs/flag"},
        "flag_or_t": {"anyOf": [{"$ref": "#/%24defs%2Ff~0l%61g"}, {"const": "t"}]},
        "texts": {"type": "array", "items": {"enum": ["</parameter>", "]"]}, "maxItems": 2},
        "only_true": {"oneOf": [{"const": True}, SHORT]},
        "mixed": {"type": ["string", "array", "boolean"], "maxLength": 2, "maxItems": 1,
                  "items": {"type": "boolean"}},
    },
    "required": ["sized", "listed", "mixed"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}, "f~lag": {"type": "boolean"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("sized", ["ab", "1234", "null", "\n\n"], ["a", "abcde", ""]),
        ("matched", ["ab", "bbb/"], ["a", "abc", "aab//"]),
        ("within", ["x", "ayzb", "/x"], ["y", "xxxxxx"]),
        ("maybe", ["abc", "null", "", "5", "[a"], ["abcd"]),
        ("either", ["abc", "12", "a1", ""], ["9", "100", "-a", "1a"]),
        ("listed", ["x", "1", "null", "a\nb"], ["2", "y"]),
        ("flag", ["true", "false"], ["True", "yes", ""]),
        ("flag_or_t", ["true", "t"], ["True", "x", ""]),
        ("texts", ["[]", '["</parameter>", "]"]'], ['["a"]', "x"]),
        ("only_true", ["true", "abc"], ["false", "False", "None", "abcd"]),
        ("mixed", ["true", "false", "[true]", "[]", "a", "ab"], ["[", "[1]", "abc", "TRUE"]),
    ],
)
def test_values_that_a_grammar_takes(name: str, good: list[str], bad: list[str]) -> None:
    parameters = {**PLAIN_VALUES, "required": [name]}
    tools = (tool("note", parameters, True),)
    grammar = of_strict("qwen3-coder", tools, True)
    for value in [*good, *bad]:
        text = coder_call("note", name, value)
        fits = takes("qwen3-coder", grammar, text)
        assert fits == (value in good), value
        if fits:
            jsonschema.validate(coder_arguments(tools, text), parameters)


def coder_call(name: str, key: str, value: str) -> str:
    body = f"<function={name}>\n<parameter={key}>\n{value}\n</parameter>\n</function>"
    return f"<tool_call>\n{body}\n</tool_call>"


def coder_arguments(tools: Any, text: str) -> Any:
    """Return what the parser makes of the arguments of a call."""
    use = ToolUse(tools, tools, True)
    [(_, arguments)] = parsed(model("qwen3-coder").tokenizer.chat_format, [text], True, use).calls
    return json.loads(arguments)


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"b": {"$ref": "#/$defs/d"}}, "$defs": {"d": SHORT}},
        {"anyOf": [False, {"type": "array", "items": {"$ref": "#/%24defs/d"}}]},
    ],
)
def test_references_within_values_of_json_are_to_what_all_parameters_share(schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"d": INTEGER}}
    tools = (tool("do", {**parameters, "required": ["a"]}, True),)
    grammar = of_strict("qwen3-coder", tools, True)
    for value in ({"b": 5}, {"b": "x"}, [5], ["x"], "text"):
        is_valid = jsonschema.Draft202012Validator(parameters).is_valid({"a": value})
        text = coder_call("do", "a", json.dumps(value))
        assert takes("qwen3-coder", grammar, text) == is_valid


@pytest.mark.parametrize("around", ["{}", "^{}$"])
def test_a_pattern_of_many_groups_within_each_other_is_read_or_refused_at_once(around: str) -> None:
    def checked(depth: int) -> str:
        pattern = around.format("(" * depth + "a|b" + ")" * depth)
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
        grammar = of_strict("qwen3-coder", (tool("do", schema, True),), True)
        return check_whole(grammar, "tools")

    assert checked(247)
    begun_s = time.process_time()
    for depth in (248, 249, 250, 251, 30_000):
        with pytest.raises(InvalidRequestError):
            checked(depth)
    assert time.process_time() - begun_s < 1


REF = {"$ref": "#/$defs/d"}
TWELVE = {f"d{step}": {"anyOf": [{"$ref": f"#/$defs/d{step + 1}"}] * 12} for step in range(8)}
LADDER = {"$defs": {**TWELVE, "d": {"$ref": "#/$defs/d0"}, "d8": SHORT}}
"""Of 12 to the power of 8 alternatives."""
WHOLE = {"type": "array", "items": {"type": "integer"}}
OWN_DEFS = {"type": "object", "properties": {"c": {"$ref": "#/properties/b"}, "b": WHOLE}}
CIRCLE = {"$defs": {"d": {"anyOf": [SHORT, *[REF] * 30]}}}


ANCHORED = {"d": {"$anchor": "anchor", "type": "integer"}}


@pytest.mark.parametrize(
    ("properties", "others", "place"),
    [
        ({"a": DATE}, {}, ".properties.a.format"),
        ({"a": {"type": "string", "pattern": "^a|b"}}, {}, ".properties.a.pattern"),
        ({"a": {"allOf": [SHORT]}}, {}, ".properties.a.allOf"),
        ({"a": {"anyOf": [REF]}}, {"$defs": {"d": DATE}}, ".properties.a.anyOf[0].format"),
        ({"a": {"enum": ["</parameter>"]}}, {}, ".properties.a.enum"),
        ({"a>": SHORT}, {}, ".properties.a>"),
        ({"a": REF}, LADDER, ".properties.a"),
        ({"a": REF}, CIRCLE, ".properties.a"),
        ({"a": {"$ref": "#anchor"}}, {"$defs": ANCHORED}, ".properties.a.$ref"),
        ({"a": {"type": "array", "items": {"$ref": "#"}}}, {}, ".properties.a"),
        ({"a": {"type": "array", "items": {"$ref": ""}}}, {}, ".properties.a"),
        ({"a": OWN_DEFS, "b": SHORT}, {"$defs": {"d": SHORT}}, ".properties.a"),
        ({"a": {"$ref": "#/properties/b"}, "b": WHOLE}, {}, ".properties.a"),
        ({"a": {"anyOf": [SHORT, False]}}, {}, ".properties.a.anyOf[1]"),
        ({}, {"required": ["a"]}, ".required"),
        ({}, {"anyOf": [{"required": ["a"]}, {}]}, ".anyOf"),
        ({}, {"patternProperties": {"a": SHORT}}, ".patternProperties"),
    ],
)
def test_what_values_between_marks_cannot_be_held_to_is_named(
    properties: dict[str, Any], others: dict[str, Any], place: str
) -> None:
    parameters = {"type": "object", "properties": properties, **others}
    tools = [TOOL, {"type": "function", "function": {"name": "do", "parameters": parameters}}]
    upstream = FakeUpstream(says("qwen3-coder", "x"))
    where = f"tools[1].function.parameters{place}"
    refusal(post("qwen3-coder", upstream, tools=tools, tool_choice="required"), 400, where)
    assert upstream.requests == []
    assert post("qwen3-coder", upstream, tools=tools).status_code == 200


def test_when_a_grammar_is_sent() -> None:
    def sampling(name: str = "qwen", **body: Any) -> Any:
        upstream = FakeUpstream(says(name, "x"))
        assert post(name, upstream, **body).status_code == 200
        return upstream.requests[-1].sampling

    strict = [{"type": "function", "function": {**TOOL["function"], "strict": True}}]
    two = [TOOL, {"type": "function", "function": {"name": "now"}}]
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    assert sampling(tools=[TOOL]).grammar == ""
    assert sampling(tools=[TOOL], tool_choice="none", response_format=None).grammar == ""
    for body in (
        {"tools": strict},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": two, "tool_choice": named},
        {"tools": two, "tool_choice": allowed},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
    ):
        sent = sampling(**body)
        assert "get_weather" in sent.grammar
        assert "now" not in sent.grammar
    marks = sampling("mixtral", tools=strict).grammar_marks
    assert marks == (model("mixtral").tokenizer.encode("[TOOL_CALLS]", False)[0],)
