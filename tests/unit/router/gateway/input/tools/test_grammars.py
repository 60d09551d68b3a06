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


def written(name: str, use: ToolUse, prompt: str, form: str, seed: int, most: int = 2000) -> str:
    """A text that a model with random logits writes under a grammar; it ends where it can."""
    tokens, chance = vocabulary(name), random.Random(seed)
    chat_format = model(name).tokenizer.chat_format
    grammar = grammar_of(chat_format, use, prompt, form)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())
    assert not matcher.is_error(), matcher.get_error()
    special = set(chat_format.tokens.values())
    bits = allocate_token_bitmask(1, tokens.vocab_size)
    ids: list[int] = []
    while len(ids) < most:
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


def checked_calls(name: str, text: str, use: ToolUse, prompt: str) -> list[tuple[str, str]]:
    whole = parsed(model(name).tokenizer.chat_format, [text], True, use, prompt)
    for called, arguments in whole.calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[called])
    return whole.calls


@pytest.mark.parametrize("name", NAMES)
def test_required_calls_are_always_valid(name: str) -> None:
    for seed in range(6):
        use = ToolUse(TOOLS, TOOLS[seed % 2 :], True, seed % 3 != 0)
        calls = checked_calls(name, written(name, use, "", "", seed), use, "")
        assert calls
        assert seed % 2 == 0 or {called for called, _ in calls} == {"get"}
        assert seed % 3 or len(calls) == 1


@pytest.mark.parametrize("name", ["qwen", "deepseek-v3"])
def test_reasoning_that_the_prompt_opens_comes_first(name: str) -> None:
    use = ToolUse(TOOLS, TOOLS, True)
    grammar = grammar_of(model(name).tokenizer.chat_format, use, "<think>\n", "")
    case = CASES["qwen" if name == "qwen" else "deepseek-v3"][1].replace(
        '"Paris"}', '"P","days":[1]}'
    )
    for text, fits in ((f"Hm.\n</think>\n\n{case}", True), (case, False)):
        matcher = LLMatcher(vocabulary(name), grammar, log_level=0)
        ids = model(name).tokenizer.encode(text, add_special_tokens=False)
        assert (all(map(matcher.consume_token, ids)) and matcher.is_accepting()) == fits


@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_allow_any_text_and_valid_calls_alone(name: str) -> None:
    use = ToolUse(TOOLS, TOOLS)
    chat_format = model(name).tokenizer.chat_format
    grammar = grammar_of(chat_format, use, "", "")
    bad = {key: case[1] for key, case in CASES.items() if case[0].calls == chat_format.calls}
    text = '<|channel|>final<|message|>It is "{[ fine.' if name == "gpt-oss" else 'It is "{[ fine.'
    case = bad[name.replace("qwen3-coder", "coder")]
    good = case.replace('"Paris"}', '"P","days":[1]}').partition("[TOOL_CALLS]now")[0]
    good = good.replace("\nParis\n<", "\nP\n</parameter>\n<parameter=days>\n[1]\n<")
    good = good.split(', {"name": "now"')[0] + "]" if name == "mixtral" else good
    for asked, fits in ((text, True), (good, True), (case, False)):
        matcher = LLMatcher(vocabulary(name), grammar, log_level=0)
        asked = asked.removesuffix("<|call|>")  # an end of the published model
        ids = model(name).tokenizer.encode(asked, add_special_tokens=False)
        assert (all(map(matcher.consume_token, ids)) and matcher.is_accepting()) == fits, asked
    for seed in range(3):
        checked_calls(name, written(name, use, "", "", seed), use, "")


@pytest.mark.parametrize("name", NAMES)
def test_with_a_response_format_an_answer_is_calls_or_of_the_form(name: str) -> None:
    use = ToolUse(TOOLS, TOOLS)
    kinds = set()
    for seed in range(12):
        text = written(name, use, "", FORM, seed)
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
        "texts": {"type": "array", "items": {"enum": ["</parameter>", "]"]}, "maxItems": 2},
        "only_true": {"oneOf": [{"const": True}, SHORT]},
        "mixed": {"type": ["string", "array", "boolean"], "maxLength": 2, "maxItems": 1,
                  "items": {"type": "boolean"}},
    },
    "required": ["sized", "listed", "mixed"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}  # fmt: skip


def test_values_between_marks_fit_their_schemas() -> None:
    tools = (tool("note", PLAIN_VALUES, True),)
    use = ToolUse(tools, tools, True)
    seen: set[str] = set()
    for seed in range(8):
        text = written("qwen3-coder", use, "", "", seed, 4000)
        whole = parsed(model("qwen3-coder").tokenizer.chat_format, [text], True, use)
        assert whole.calls
        for _, arguments in whole.calls:
            jsonschema.validate(json.loads(arguments), PLAIN_VALUES)
            seen |= json.loads(arguments).keys()
    assert seen == PLAIN_VALUES["properties"].keys()


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
        ("texts", ["[]", '["</parameter>", "]"]'], ['["a"]', "x"]),
        ("only_true", ["true", "abc"], ["false", "False", "None", "abcd"]),
        ("mixed", ["true", "false", "[true]", "[]", "a", "ab"], ["[", "[1]", "abc", "TRUE"]),
    ],
)
def test_values_between_marks_that_a_grammar_takes(
    name: str, good: list[str], bad: list[str]
) -> None:
    parameters = {**PLAIN_VALUES, "required": [name]}
    tools = (tool("note", parameters, True),)
    use = ToolUse(tools, tools, True)
    chat_format = model("qwen3-coder").tokenizer.chat_format
    grammar = grammar_of(chat_format, use, "", "")
    for value in [*good, *bad]:
        body = f"<function=note>\n<parameter={name}>\n{value}\n</parameter>\n</function>"
        text = f"<tool_call>\n{body}\n</tool_call>"
        matcher = LLMatcher(vocabulary("qwen3-coder"), grammar, log_level=0)
        ids = model("qwen3-coder").tokenizer.encode(text, add_special_tokens=False)
        fits = all(map(matcher.consume_token, ids)) and matcher.is_accepting()
        assert fits == (value in good), (value, matcher.get_error())
        if fits:
            [(_, arguments)] = parsed(chat_format, [text], True, use).calls
            jsonschema.validate(json.loads(arguments), parameters)


REFERENCES = [
    "#/$defs/x%20y", "#/$defs/%C3%A9", "#/$defs/a~1b", "#/$defs/a%7E1b", "#/$defs/l/anyOf/0",
    "#/%24defs%2Fl/anyOf/0",
]  # fmt: skip
INTEGER = {"type": "integer"}
REFERRED = {"x y": INTEGER, "é": INTEGER, "a/b": INTEGER, "l": {"anyOf": [INTEGER, SHORT]}}


@pytest.mark.parametrize("reference", REFERENCES)
def test_values_between_marks_are_held_to_references_however_they_are_written(
    reference: str,
) -> None:
    number = {"$ref": reference}
    for schema in (number, {"anyOf": [number, {"const": "t"}]}):
        parameters = {"type": "object", "properties": {"a": schema}, "$defs": REFERRED}
        tools = (tool("do", {**parameters, "required": ["a"]}, True),)
        use = ToolUse(tools, tools, True)
        chat_format = model("qwen3-coder").tokenizer.chat_format
        grammar = grammar_of(chat_format, use, "", "")
        for value, meant in (("5", 5), ("x", "x"), ("t", "t")):
            body = f"<function=do>\n<parameter=a>\n{value}\n</parameter>\n</function>"
            text = f"<tool_call>\n{body}\n</tool_call>"
            matcher = LLMatcher(vocabulary("qwen3-coder"), grammar, log_level=0)
            ids = model("qwen3-coder").tokenizer.encode(text, add_special_tokens=False)
            fits = all(map(matcher.consume_token, ids)) and matcher.is_accepting()
            assert fits == jsonschema.Draft202012Validator(parameters).is_valid({"a": meant})
            [(_, arguments)] = parsed(chat_format, [text], True, use).calls
            assert json.loads(arguments) == {"a": meant}


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
    grammar = grammar_of(
        model("qwen3-coder").tokenizer.chat_format, ToolUse(tools, tools, True), "", ""
    )
    for value in ({"b": 5}, {"b": "x"}, [5], ["x"], "text"):
        body = f"<function=do>\n<parameter=a>\n{json.dumps(value)}\n</parameter>\n</function>"
        ids = model("qwen3-coder").tokenizer.encode(
            f"<tool_call>\n{body}\n</tool_call>", add_special_tokens=False
        )
        matcher = LLMatcher(vocabulary("qwen3-coder"), grammar, log_level=0)
        fits = all(map(matcher.consume_token, ids)) and matcher.is_accepting()
        assert fits == jsonschema.Draft202012Validator(parameters).is_valid({"a": value})


def test_a_reference_that_is_not_found_between_marks_is_named() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#anchor"}},
        "$defs": {"d": {"$anchor": "anchor", "type": "integer"}},
    }
    function = {"name": "do", "strict": True, "parameters": parameters}
    answer = post("qwen3-coder", tools=[{"type": "function", "function": function}])
    where = "tools[0].function.parameters.properties.a.$ref"
    assert "'#anchor', which XML tool calls cannot resolve" in refusal(answer, 400, where)


@pytest.mark.parametrize("around", ["{}", "^{}$"])
def test_a_pattern_of_many_groups_within_each_other_is_read_or_refused_at_once(around: str) -> None:
    def checked(depth: int) -> str:
        pattern = around.format("(" * depth + "a|b" + ")" * depth)
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
        tools = (tool("do", schema, True),)
        chat_format = model("qwen3-coder").tokenizer.chat_format
        return check_whole(grammar_of(chat_format, ToolUse(tools, tools, True), "", ""), "tools")

    assert checked(247)
    begun_s = time.process_time()
    for depth in (248, 249, 250, 251, 30_000):
        with pytest.raises(InvalidRequestError):
            checked(depth)
    assert time.process_time() - begun_s < 1


TWELVE = {f"d{step}": {"anyOf": [{"$ref": f"#/$defs/d{step + 1}"}] * 12} for step in range(8)}
LADDER = {"$defs": {**TWELVE, "d": {"$ref": "#/$defs/d0"}, "d8": SHORT}}
"""Of 12 to the power of 8 alternatives."""
WHOLE = {"type": "array", "items": {"type": "integer"}}
OWN_DEFS = {"type": "object", "properties": {"c": {"$ref": "#/properties/b"}, "b": WHOLE}}
CIRCLE = {"$defs": {"d": {"anyOf": [SHORT, *[{"$ref": "#/$defs/d"}] * 30]}}}


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"properties": {"a": DATE}}, ".properties.a.format"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b"}}}, ".properties.a.pattern"),
        ({"properties": {"a": {"allOf": [SHORT]}}}, ".properties.a.allOf"),
        (
            {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/d"}]}}, "$defs": {"d": DATE}},
            ".properties.a.anyOf[0].format",
        ),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, ".properties.a.enum"),
        ({"properties": {"a>": SHORT}}, ".properties.a>"),
        ({"properties": {"a": {"$ref": "#/$defs/d"}}, **LADDER}, ".properties.a"),
        ({"properties": {"a": {"$ref": "#/$defs/d"}}, **CIRCLE}, ".properties.a"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}, ".properties.a"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": ""}}}}, ".properties.a"),
        ({"properties": {"a": OWN_DEFS, "b": SHORT}, "$defs": {"d": SHORT}}, ".properties.a"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": WHOLE}}, ".properties.a"),
        ({"properties": {"a": {"anyOf": [SHORT, False]}}}, ".properties.a.anyOf[1]"),
        ({"required": ["a"]}, ".required"),
        ({"anyOf": [{"required": ["a"]}, {}]}, ".anyOf"),
        ({"patternProperties": {"a": SHORT}}, ".patternProperties"),
    ],
)
def test_what_values_between_marks_cannot_be_held_to_is_named(
    parameters: dict[str, Any], place: str
) -> None:
    function = {"name": "do", "parameters": {"type": "object", **parameters}}
    tools = [TOOL, {"type": "function", "function": function}]
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
    named = {"type": "function", "function": {"name": "get_weather"}}
    other = {"type": "function", "function": {"name": "now"}}
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", **named}]},
    }
    assert sampling(tools=[TOOL]).grammar == ""
    assert sampling(tools=[TOOL], tool_choice="none", response_format=None).grammar == ""
    for body in (
        {"tools": strict},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL, other], "tool_choice": named},
        {"tools": [TOOL, other], "tool_choice": allowed},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
    ):
        sent = sampling(**body)
        assert "get_weather" in sent.grammar
        assert "now" not in sent.grammar
    marks = sampling("mixtral", tools=strict).grammar_marks
    assert marks == (model("mixtral").tokenizer.encode("[TOOL_CALLS]", False)[0],)
