"""Answers in the families' published formats, however the stream cuts them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.gateway.input.chat_request import AnswerFormat
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import ChatFormat
from tests.unit.router.gateway.input.tools.answers import (
    DEEPSEEK,
    HARMONY,
    LATER,
    TOOLS,
    USE,
    Whole,
    parsed,
    tool,
)

QWEN = ChatFormat("tool_call", thinks=True)
SMOL = ChatFormat("tool_call")
CODER = ChatFormat("qwen3_coder")
MISTRAL = ChatFormat("mistral", special={"[TOOL_CALLS]": 0})
MISTRAL_V11 = ChatFormat("mistral_v11", special=dict(zip(LATER, range(3), strict=True)))
MISTRAL_V13 = ChatFormat("mistral_v13", special=dict(zip(LATER[:2], range(2), strict=True)))
V3 = ChatFormat("deepseek_v3", True, dict(zip(DEEPSEEK, range(5), strict=True)))
V3_1 = ChatFormat("deepseek_v3_1", True, dict(zip(DEEPSEEK, range(5), strict=True)))
GPT_OSS = ChatFormat("harmony", special=dict(zip(HARMONY, range(7), strict=True)))


def of_json(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def marked(call: str) -> str:
    return f"<tool_call>{call}</tool_call>"


def called(*calls: tuple[str, str], content: str = "", reasoning: str = "") -> Whole:
    return Whole(content, reasoning, list(calls))


PARIS = '{"city": "Paris"}'
OSLO = '{"city": "Oslo", "days": 2}'
CALL, NOW = ("get_weather", PARIS), ("now", "{}")
PARIS_CALL, NOW_CALL, RM_CALL = of_json(*CALL), of_json(*NOW), of_json("rm", "{}")
QWEN_CALL = marked(f"\n{PARIS_CALL}\n")
QUOTED = '{"city": "</tool_call>\\"}<think>"}'
NESTED = '{"a": [{"b": {"c": "}]"}}, []]}'
V3_CALL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    f"```json\n{PARIS}\n```<｜tool▁call▁end｜>"
)
V3_1_CALL = f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
HARMONY_CALL = (
    f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>"
)
THOUGHT = "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant"
CODER_CALL = marked(
    "\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
)
LATER_CALL, LATER_NOW = f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "[TOOL_CALLS]now[ARGS]{}"
OF_FORMAT: list[tuple[ChatFormat, dict[str, tuple[str, Whole]]]] = [
    (QWEN, {
        "qwen": (QWEN_CALL, called(CALL)),
        "qwen, text and thought": (f"<think>\nLet me see.\n</think>\n\nI look.\n{QWEN_CALL}",
                                   called(CALL, content="I look.", reasoning="Let me see.")),
        "qwen, two": (f"{QWEN_CALL}\n{marked(NOW_CALL)}", called(CALL, NOW)),
        "qwen, text behind": (f"{QWEN_CALL} and so on", called(CALL, content=" and so on")),
        "qwen, other order": (marked(f'{{"arguments": {PARIS}, "name": "get_weather"}}'),
                              called(CALL)),
        "qwen, parameters": (QWEN_CALL.replace("arguments", "parameters"), called(CALL)),
        "qwen, arguments as a text": (marked(of_json("get_weather", json.dumps(PARIS))),
                                      called(CALL)),
        "qwen, marks in a string": (marked(of_json("get_weather", QUOTED)),
                                    called(("get_weather", QUOTED))),
        "qwen, nested": (marked(of_json("now", NESTED)), called(("now", NESTED))),
        "qwen, no call at all": ("It is <b>fine</b>. <tool", Whole("It is <b>fine</b>. <tool")),
        "qwen, unknown tool": (f"{marked(RM_CALL)} x", Whole(f"{marked(RM_CALL)} x")),
        "qwen, a name that is no JSON": (marked(of_json(r"\q", "{}")),
                                         Whole(marked(of_json(r"\q", "{}")))),
        "qwen, empty marks": (marked("") + QWEN_CALL, called(CALL, content=marked(""))),
        "qwen, a mark alone": ("see <tool_call>\n", Whole("see <tool_call>\n")),
    }),
    (SMOL, {
        "smollm2, a list": (marked(f"[{PARIS_CALL}, {of_json('get_weather', OSLO)}]"),
                            called(CALL, ("get_weather", OSLO))),
        "smollm2, an empty list": (marked("[]"), Whole("")),
        "smollm2, no thought": ("<think>x</think>y", Whole("<think>x</think>y")),
    }),
    (MISTRAL, {
        "mixtral": (f"[TOOL_CALLS] [{PARIS_CALL}, {NOW_CALL}]", called(CALL, NOW)),
        "mixtral, text before": (f"I look.[TOOL_CALLS] [{PARIS_CALL}]",
                                 called(CALL, content="I look.")),
        "mixtral, not valid": (f"[TOOL_CALLS] [{RM_CALL}] sorry", Whole(f" [{RM_CALL}] sorry")),
        "mixtral, mark twice": (f"[TOOL_CALLS][TOOL_CALLS] [{PARIS_CALL}]", called(CALL)),
        "mixtral, mark within a list": (f"[TOOL_CALLS] [{PARIS_CALL}, [TOOL_CALLS] [{PARIS_CALL}]",
                                        called(CALL, CALL, content=",")),
        "mixtral, begun list": ("So [TOOL_CALLS] [", Whole("So  [")),
    }),
    (MISTRAL_V11, {
        "mistral-v11": (f"[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{PARIS}"
                        "[TOOL_CALLS]now[CALL_ID]abcDEF124[ARGS]{}", called(CALL, NOW)),
    }),
    (MISTRAL_V13, {
        "mistral-v13": (LATER_CALL + LATER_NOW, called(CALL, NOW)),
        "mistral-v13, text before": (f"I look.{LATER_CALL}", called(CALL, content="I look.")),
        "mistral-v13, unknown tool": (f"So [TOOL_CALLS]rm[ARGS]{PARIS} sorry",
                                      Whole(f"So rm{PARIS} sorry")),
        "mistral-v13, mark twice": (f"[TOOL_CALLS]{LATER_CALL}", called(CALL)),
        "mistral-v13, no arguments": ("[TOOL_CALLS]now[ARGS]", Whole("now")),
    }),
    (CODER, {
        "coder": (CODER_CALL, called(CALL)),
        "coder, text before, and two": (
            f"I look.\n\n{CODER_CALL}\n{marked('<function=now></function>')}",
            called(CALL, NOW, content="I look.")),
        "coder, on one line": (
            marked("<function=get_weather><parameter=city>Paris</parameter>"
                   "<parameter=days>2</parameter></function>"),
            called(("get_weather", '{"city": "Paris", "days": 2}'))),
        "coder, lines and quotes": (
            CODER_CALL.replace("Paris", '\na "b"\n\\ </param> é🙂\n') + " and so on",
            called(("get_weather", '{"city": "\\na \\"b\\"\\n\\\\ </param> é🙂\\n"}'),
                   content=" and so on")),
        "coder, an empty text": (CODER_CALL.replace("Paris", ""),
                                 called(("get_weather", '{"city": ""}'))),
        "coder, an unknown parameter": (CODER_CALL.replace("=city", "=town"),
                                        called(("get_weather", '{"town": "Paris"}'))),
        "coder, of no type that is allowed": (CODER_CALL.replace("=city", "=days"),
                                              called(("get_weather", '{"days": "Paris"}'))),
        "coder, unknown tool": (CODER_CALL.replace("get_weather", "rm") + " x",
                                Whole(CODER_CALL.replace("get_weather", "rm") + " x")),
        "coder, JSON between the marks": (QWEN_CALL, Whole(QWEN_CALL)),
        "coder, empty marks": (marked("") + CODER_CALL, called(CALL, content=marked(""))),
        "coder, marks alone": ("<tool_call>\n<function=", Whole("<tool_call>\n<function=")),
    }),
    (V3, {
        "deepseek-v3": (f"{BEGIN}{V3_CALL}\n{V3_CALL}{END}", called(CALL, CALL)),
        "deepseek-r1": (f"<think>\nHm.\n</think>\n\nSo:{BEGIN}{V3_CALL}{END}",
                        called(CALL, content="So:", reasoning="Hm.")),
        "deepseek-v3, unknown tool": (V3_CALL.replace("get_weather", "rm"),
                                      Whole(f"functionrm\n```json\n{PARIS}\n```")),
    }),
    (V3_1, {"deepseek-v3.1": (f"{BEGIN}{V3_1_CALL}{V3_1_CALL}{END}", called(CALL, CALL))}),
    (GPT_OSS, {
        "gpt-oss": (THOUGHT + HARMONY_CALL, called(CALL, reasoning="Need weather.")),
        "gpt-oss, recipient first": (
            f"{THOUGHT} to=functions.get_weather<|channel|>commentary json"
            f"<|message|>{PARIS}<|call|>", called(CALL, reasoning="Need weather.")),
        "gpt-oss, answer": (f"{THOUGHT}<|channel|>final<|message|>It is fine.\n<|return|>",
                            Whole("It is fine.\n", "Need weather.")),
        "gpt-oss, preamble": (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
            f"{HARMONY_CALL}<|start|>assistant{HARMONY_CALL}",
            called(CALL, CALL, content="I look.")),
        "gpt-oss, unknown tool": (HARMONY_CALL.replace("get_weather", "rm"), Whole(PARIS)),
        "gpt-oss, no channels": ("It is fine.", Whole("It is fine.")),
        "gpt-oss, two thoughts": (f"{THOUGHT}{THOUGHT}<|channel|>final<|message|>Yes",
                                  Whole("Yes", "Need weather.\nNeed weather.")),
    }),
]  # fmt: skip
CASES = {name: (format_, *case) for format_, cases in OF_FORMAT for name, case in cases.items()}


def cuts(text: str) -> Iterator[list[str]]:
    """The text as a whole, in characters, and in two at every place."""
    yield [text]
    yield list(text)
    yield from ([text[:place], text[place:]] for place in range(1, len(text)))


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_published_formats_at_every_cut(name: str, is_held: bool) -> None:
    format_, text, expected = CASES[name]
    expected.finish_reason = "tool_calls" if expected.calls else "stop"
    for pieces in cuts(text):
        assert parsed(format_, pieces, is_held) == expected, pieces


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2].calls])
def test_arguments_come_in_pieces_after_the_name(name: str) -> None:
    format_, text, expected = CASES[name]
    parser = AnswerFormat(format_, "", USE, False).begin()
    parts = [part for char in text for part in parser.push(char, False).calls]
    assert [part.name for part in parts if part.name] == [name for name, _ in expected.calls]
    if name not in ("qwen, other order", "qwen, arguments as a text"):
        assert not any(part.name and part.arguments for part in parts)
        if format_ != CODER:
            assert len(parts) == sum(1 + len(arguments) for _, arguments in expected.calls)


def test_a_text_between_marks_comes_as_it_is_written() -> None:
    parser = AnswerFormat(CODER, "", USE, False).begin()
    parts = [part for char in CODER_CALL for part in parser.push(char, False).calls]
    assert [part.arguments for part in parts] == ["", "{", '"city": ', '"', *"Paris", '"', "}"]


TEXT_OR_NULL = {"type": ["string", "null"]}
TEXT_OR_NUMBER = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
AS_IT_STANDS: list[tuple[dict[str, Any], list[str]]] = [
    ({"type": "integer"}, ["5", "9" * 5000, "5.0"]),
    ({"type": "number"}, ["5"]),
    ({"type": "boolean"}, ["true"]),
    (TEXT_OR_NULL, ["null"]),
    (TEXT_OR_NUMBER, ["7"]),
    ({"$ref": "#/$defs/flag"}, ["true"]),
    ({"enum": [1, "a"]}, ["1"]),
    ({"type": "array"}, ['[1, "a</parameter>\\"b", {"c": []}]']),
    ({"type": "object"}, ['{\n  "a": 1,\n  "a": 2\n}']),
]
AS_TEXT: list[tuple[dict[str, Any], list[str]]] = [
    ({"type": "string"}, ["5", "null"]),
    ({}, ["5"]),
    ({"type": "integer"}, ["5.5", "five"]),
    ({"type": "number"}, ["NaN"]),
    ({"type": "boolean"}, ["no"]),
    (TEXT_OR_NULL, ["nothing", "[a"]),
    (TEXT_OR_NUMBER, ['"7"']),
    ({"enum": [1, "a"]}, ["a"]),
    ({"type": "array"}, ['["a', "[" * 20_000]),
    ({"type": "object"}, ["{'a': 1}"]),
]
VALUES = [
    *((schema, value, value) for schema, values in AS_IT_STANDS for value in values),
    *((schema, value, json.dumps(value)) for schema, values in AS_TEXT for value in values),
    ({"type": "integer"}, " 12 ", "12"),
    ({"type": "boolean"}, "False", "false"),
    (TEXT_OR_NULL, "None", "null"),
]
"""A parameter's schema, its value as a model writes it, and as JSON."""


@pytest.mark.parametrize(
    ("schema", "value", "expected"), VALUES, ids=[f"{v[0]} {v[1][:9]!r}" for v in VALUES]
)
def test_values_have_the_schemas_types(schema: dict[str, Any], value: str, expected: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": schema},
        "$defs": {"flag": {"type": "boolean"}},
    }
    tools = (tool("do", parameters),)
    body = f"<function=do>\n<parameter=a>\n{value}\n</parameter>\n</function>"
    text = f"<tool_call>\n{body}\n</tool_call>"
    for pieces in cuts(text) if len(text) < 1000 else [[text], list(text)]:
        for is_held in (False, True):
            whole = parsed(CODER, pieces, is_held, ToolUse(tools, tools))
            assert whole == Whole("", "", [("do", f'{{"a": {expected}}}')], "tool_calls")
            json.loads(expected, parse_int=str)


@pytest.mark.parametrize(
    "end",
    ["", "<parameter=city>\nPar", "<parameter=days>\n1", "<parameter=city>\nParis\n</parameter>\n"],
)
def test_a_call_between_marks_that_is_cut_short(end: str) -> None:
    text = f"So\n<tool_call>\n<function=get_weather>\n{end}"
    for pieces in cuts(text):
        whole = parsed(CODER, pieces, is_held=True, reason="length")
        assert whole == Whole(text, finish_reason="length")
        streamed = parsed(CODER, pieces, reason="length")
        assert (streamed.content, streamed.finish_reason) == ("So", "length")
        [(name, arguments)] = streamed.calls
        assert name == "get_weather"
        assert '{"city": "Paris"'.startswith(arguments) or arguments == '{"days": '


@pytest.mark.parametrize(
    "broken", ["x", "</tool_call>", "<parameter=>", "<function=now>", "</param>"]
)
def test_a_call_between_marks_that_breaks_off(broken: str) -> None:
    text = f"<tool_call>\n<function=get_weather>\n{broken} {CODER_CALL}"
    for pieces in cuts(text):
        whole = parsed(CODER, pieces, is_held=True)
        assert (whole.content, whole.calls) == (text.removesuffix(CODER_CALL).rstrip(), [CALL])
        streamed = parsed(CODER, pieces)
        assert streamed.calls == [("get_weather", "{"), CALL]
        assert streamed.finish_reason == "stop"


BROKEN = {
    "a bracket": '<tool_call>\n{"name": "get_weather", "arguments": {"city": ]}}\n</tool_call> x',
    "a constant": '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
    "a comma": '<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>',
    "a line": '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb"}}</tool_call>',
    "an end": '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_json_stays_content_and_is_no_end_of_a_stream(name: str) -> None:
    first = parsed(QWEN, [BROKEN[name]])
    assert (first.finish_reason, len(first.calls)) == ("stop", 1)
    for pieces in cuts(BROKEN[name]):
        assert parsed(QWEN, pieces, is_held=True) == Whole(BROKEN[name], finish_reason="stop")
        assert parsed(QWEN, pieces) == first


@pytest.mark.parametrize(
    ("format_", "text"), [(V3_1, "<｜tool▁call▁begin｜>"), (CODER, "<tool_call>")]
)
def test_text_after_a_mark_is_shown_once_no_call_can_follow(format_: ChatFormat, text: str) -> None:
    parser = AnswerFormat(format_, "", USE, False).begin()
    shown = "" if format_.special else text
    assert parser.push(text, False).content == ""
    assert parser.push(" I may call", False).content == f"{shown} I may call"


def test_a_good_call_after_a_broken_one() -> None:
    for name in ("a bracket", "a comma", "a line"):
        for pieces in cuts(BROKEN[name] + QWEN_CALL):
            whole = parsed(QWEN, pieces, is_held=True)
            assert (whole.content, whole.calls) == (BROKEN[name], [CALL])


def test_reasoning_that_the_prompt_opens() -> None:
    for pieces in cuts("Let me see.\n</think>\n\nIt is </think> fine."):
        whole = parsed(QWEN, pieces, prompt="<|im_start|>assistant\n<think>\n")
        assert whole == Whole("It is </think> fine.", "Let me see.", finish_reason="stop")
    closed = parsed(QWEN, ["<b>"], prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert closed.content == "<b>"
    open_end = parsed(QWEN, ["Let me", " see </thi"], prompt="<think>\n", reason="length")
    assert open_end == Whole("", "Let me see </thi", finish_reason="length")


def test_without_tools_calls_are_text() -> None:
    whole = parsed(QWEN, [f"<think>a</think>{QWEN_CALL}"], use=None)
    assert whole == Whole(QWEN_CALL, "a", finish_reason="stop")


TWICE = '{"city": "a", "city": "b", "days": 1, "days": 1e999}'
HUGE = f'{{"days": {"9" * 5000}}}'
HALF = r'{"city": "\ud800"}'


@pytest.mark.parametrize("arguments", [TWICE, HUGE, HALF])
def test_arguments_are_the_models_own_text_in_whole_answers_and_streams(arguments: str) -> None:
    """Keys that come twice, and numbers and texts that Python refuses to read, are JSON."""
    in_order = of_json("get_weather", arguments)
    # An escape may be one of the text around the arguments.
    as_text = json.dumps(arguments).replace(r"\\", "\\")
    for format_, text in (
        (QWEN, marked(in_order)),
        (QWEN, marked(f'{{"arguments": {arguments}, "name": "get_weather"}}')),
        (QWEN, marked(f'{in_order[:-1]}, "x": {HUGE}}}')),
        (QWEN, marked(of_json("get_weather", as_text))),
        (MISTRAL, f"[TOOL_CALLS] [{in_order}]"),
        (V3_1, V3_1_CALL.replace(PARIS, arguments)),
        (GPT_OSS, HARMONY_CALL.replace(PARIS, arguments)),
    ):
        whole = parsed(format_, [text], is_held=True)
        assert whole == Whole("", "", [("get_weather", arguments)], "tool_calls")
        for pieces in cuts(text) if len(text) < 100 else ([text], list(text)):
            assert parsed(format_, pieces, is_held=False) == whole


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ('"name": "now", "arguments": {"a": 1}, "name": "get_weather"', ("now", '{"a": 1}')),
        ('"name": "now", "arguments": {"a": 1}, "arguments": {}', ("now", '{"a": 1}')),
        ('"name": "now", "parameters": {"a": 1}, "arguments": {}', ("now", '{"a": 1}')),
        ('"name": "rm", "name": "now", "arguments": {}', None),
        ('"name": 5, "arguments": {}', None),
        ('5: 5, "name": "now", "arguments": {}', None),
        ('"name": "now",, "arguments": {}', None),
        ('"name": "now", "arguments": "' + "[" * 100_000 + '"', None),
    ],
)
def test_the_first_of_two_members_holds(members: str, expected: tuple[str, str] | None) -> None:
    """A stream has passed it on before the second comes."""
    text = f"<tool_call>{{{members}}}</tool_call>"
    whole = parsed(QWEN, [text], is_held=True)
    assert whole.calls == ([] if expected is None else [expected])
    assert whole.content == (text if expected is None else "")
    assert parsed(QWEN, [text], is_held=False) == whole


def test_a_stream_shows_a_call_early_by_the_length_of_what_stands_before_its_arguments() -> None:
    opens, rest, arguments = "<tool_call>", '"name": "now", "arguments": ', '{"a": 1'
    for length, is_shown in ((1023, True), (1024, True), (1025, False), (2000, False)):
        text = f"{opens}{{{' ' * (length - 1 - len(rest))}{rest}{arguments}"
        shown = Whole("", "", [("now", arguments)], "length")
        expected = shown if is_shown else Whole(text, finish_reason="length")
        for pieces in ([text], list(text), [text[:900], text[900:]], [text[:-7], text[-7:]]):
            assert parsed(QWEN, pieces, reason="length") == expected
            whole = parsed(QWEN, [*pieces, "}}</tool_call>"])
            assert whole == Whole("", "", [("now", f"{arguments}}}")], "tool_calls")


def test_at_most_one_call_where_they_are_not_parallel() -> None:
    use = ToolUse(TOOLS, TOOLS, is_parallel=False)
    for format_, text in ((QWEN, f"{QWEN_CALL}\n{QWEN_CALL} x"), CASES["mixtral"][:2]):
        for is_held in (False, True):
            for pieces in cuts(text):
                whole = parsed(format_, pieces, is_held, use)
                assert whole == Whole("", "", [CALL], "tool_calls"), pieces


def test_values_have_the_types_of_their_own_tools_schema() -> None:
    tools = (
        tool("do", {"properties": {"a": {"enum": [1, 2, "a"]}, "b": {"type": "integer"}}}),
        tool("other", {"properties": {"a": {"type": "string"}}}),
    )
    calls = "".join(
        marked(
            f"<function={name}><parameter=a>1</parameter><parameter={key}>1</parameter></function>"
        )
        for name, key in (("do", "b"), ("do", "b"), ("other", "c"))
    )
    whole = parsed(CODER, [calls], use=ToolUse(tools, tools))
    numbers, texts = '{"a": 1, "b": 1}', '{"a": "1", "c": "1"}'
    assert whole.calls == [("do", numbers), ("do", numbers), ("other", texts)]


@pytest.mark.parametrize("last", [{"type": "integer"}, {"$ref": "#/$defs/d0"}])
def test_types_behind_many_references_are_found_at_once(last: dict[str, Any]) -> None:
    """By way of each reference there are 30 to the power of 9 schemas, or no end of them."""
    steps = {f"d{step}": {"anyOf": [{"$ref": f"#/$defs/d{step + 1}"}] * 30} for step in range(9)}
    schema = {
        "properties": {"a": {"anyOf": [{"$ref": "#/$defs/d0"}, {"type": "null"}]}},
        "$defs": {**steps, "d9": last},
    }
    tools = (tool("do", schema),)
    call = "<function=do>\n<parameter=a>\n5\n</parameter>\n</function>"
    begun_s = time.process_time()
    whole = parsed(CODER, [f"<tool_call>{call}</tool_call>"], use=ToolUse(tools, tools))
    assert whole.calls == [("do", '{"a": 5}' if "type" in last else '{"a": "5"}')]
    assert time.process_time() - begun_s < 1


@pytest.mark.parametrize(
    ("format_", "is_held"),
    [(QWEN, False), (MISTRAL, True), (V3, True), (GPT_OSS, False), (CODER, False)],
)
def test_the_time_is_linear(format_: ChatFormat, is_held: bool) -> None:
    opens = {"mistral": "[TOOL_CALLS]", "harmony": "<|channel|>"}
    opens |= {"tool_call": "<tool_call>", "qwen3_coder": "<tool_call>\n<function=get_weather>"}
    mark = opens.get(format_.calls, "<｜tool▁call▁begin｜>")
    for text in (mark, "{", '{"name": "now", "arguments": {"a": "', " ", "\n", "<", "[", '"'):
        leads = ("", mark, mark + '[{"name": "now", "arguments": {"a": [')
        if format_ == CODER:
            leads += tuple(f"{mark}<parameter={key}>" for key in ("city", "days"))
        for lead in leads:
            begun_s = time.process_time()
            parsed(format_, [lead, *[text] * 4000], is_held)
            assert time.process_time() - begun_s < 1, (text, lead)


PARTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", "\n", " ", "{", "}",
        "[", "]", ",", '"', "\\", QWEN_CALL, V3_CALL, V3_1_CALL, HARMONY_CALL, THOUGHT, "x",
        '{"name": "now", "arguments": {', r'{"name": "\q", "arguments": {',
        "<function=get_weather>", "<function=now>", "<parameter=city>", "<parameter=days>",
        "</parameter>", "</function>", CODER_CALL, "[ARGS]", "[CALL_ID]", "now", LATER_CALL,
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```",
        "<|channel|>", "<|message|>", "<|end|>", "final", "é🙂",
    ]
)  # fmt: skip


@settings(max_examples=150)
@given(
    st.lists(PARTS, max_size=12),
    st.sampled_from([QWEN, MISTRAL, MISTRAL_V11, CODER, V3, V3_1, GPT_OSS]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_no_cut_changes_anything(parts, format_, is_held, random) -> None:  # type: ignore[no-untyped-def]
    text = "".join(parts)
    places = sorted(random.choices(range(len(text) + 1), k=6))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = parsed(format_, [text], is_held)
    assert parsed(format_, pieces, is_held) == whole
    assert parsed(format_, list(text), is_held) == whole
    for _, arguments in whole.calls if is_held else ():
        assert isinstance(json.loads(arguments), dict)
