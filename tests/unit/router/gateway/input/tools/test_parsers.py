"""Answers in the families' published formats, however the stream cuts them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.gateway.input.tools.answer import AnswerFormat
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import ChatFormat
from tests.unit.router.gateway.input.tools.answers import (
    CODER,
    GPT_OSS,
    MISTRAL,
    MISTRAL_V11,
    MISTRAL_V13,
    QWEN,
    SMOL,
    TOOLS,
    USE,
    V3,
    V3_1,
    Whole,
    parsed,
    tool,
)

PARIS = '{"city": "Paris"}'
OSLO = '{"city": "Oslo", "days": 2}'
CALL = ("get_weather", PARIS)
QWEN_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
V3_CALL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    f"```json\n{PARIS}\n```<｜tool▁call▁end｜>"
)
V3_1_CALL = f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
HARMONY_CALL = (
    f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>"
)
THOUGHT = "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant"
PARIS_CALL = f'{{"name": "get_weather", "arguments": {PARIS}}}'
CODER_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>"
)
LATER_CALL = f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"
CASES: dict[str, tuple[ChatFormat, str, Whole]] = {
    "qwen": (QWEN, QWEN_CALL, Whole("", "", [CALL])),
    "qwen, text and thought": (
        QWEN,
        f"<think>\nLet me see.\n</think>\n\nI look.\n{QWEN_CALL}",
        Whole("I look.", "Let me see.", [CALL]),
    ),
    "qwen, two": (
        QWEN,
        f'{QWEN_CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        Whole("", "", [CALL, ("now", "{}")]),
    ),
    "qwen, text behind": (QWEN, f"{QWEN_CALL} and so on", Whole(" and so on", "", [CALL])),
    "qwen, other order": (
        QWEN,
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>',
        Whole("", "", [CALL]),
    ),
    "qwen, parameters": (
        QWEN,
        f'<tool_call>\n{{"name": "get_weather", "parameters": {PARIS}}}\n</tool_call>',
        Whole("", "", [CALL]),
    ),
    "qwen, arguments as a text": (
        QWEN,
        f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(PARIS)}}}</tool_call>',
        Whole("", "", [CALL]),
    ),
    "qwen, marks in a string": (
        QWEN,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "</tool_call>\\"}<think>"}}\n'
        "</tool_call>",
        Whole("", "", [("get_weather", '{"city": "</tool_call>\\"}<think>"}')]),
    ),
    "qwen, nested": (
        QWEN,
        '<tool_call>{"name": "now", "arguments": {"a": [{"b": {"c": "}]"}}, []]}}</tool_call>',
        Whole("", "", [("now", '{"a": [{"b": {"c": "}]"}}, []]}')]),
    ),
    "qwen, no call at all": (QWEN, "It is <b>fine</b>. <tool", Whole("It is <b>fine</b>. <tool")),
    "qwen, unknown tool": (
        QWEN,
        '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> x',
        Whole('<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> x'),
    ),
    "qwen, empty marks": (
        QWEN,
        f"<tool_call></tool_call>{QWEN_CALL}",
        Whole("<tool_call></tool_call>", "", [CALL]),
    ),
    "qwen, a mark alone": (QWEN, "see <tool_call>\n", Whole("see <tool_call>\n")),
    "smollm2, a list": (
        SMOL,
        f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}, '
        f'{{"name": "get_weather", "arguments": {OSLO}}}]</tool_call>',
        Whole("", "", [CALL, ("get_weather", OSLO)]),
    ),
    "smollm2, an empty list": (SMOL, "<tool_call>[]</tool_call>", Whole()),
    "smollm2, no thought": (SMOL, "<think>x</think>y", Whole("<think>x</think>y")),
    "mixtral": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, '
        f'{{"name": "now", "arguments": {{}}}}]',
        Whole("", "", [CALL, ("now", "{}")]),
    ),
    "mixtral, text before": (
        MISTRAL,
        f'I look.[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]',
        Whole("I look.", "", [CALL]),
    ),
    "mixtral, not valid": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "rm", "arguments": {}}] sorry',
        Whole(' [{"name": "rm", "arguments": {}}] sorry'),
    ),
    "mixtral, mark twice": (
        MISTRAL,
        f"[TOOL_CALLS][TOOL_CALLS] [{PARIS_CALL}]",
        Whole("", "", [CALL]),
    ),
    "mixtral, mark within a list": (
        MISTRAL,
        f"[TOOL_CALLS] [{PARIS_CALL}, [TOOL_CALLS] [{PARIS_CALL}]",
        Whole(",", "", [CALL, CALL]),
    ),
    "mixtral, begun list": (MISTRAL, "So [TOOL_CALLS] [", Whole("So  [")),
    "mistral-v11": (
        MISTRAL_V11,
        f"[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{PARIS}"
        f"[TOOL_CALLS]now[CALL_ID]abcDEF124[ARGS]{{}}",
        Whole("", "", [CALL, ("now", "{}")]),
    ),
    "mistral-v13": (
        MISTRAL_V13,
        f"{LATER_CALL}[TOOL_CALLS]now[ARGS]{{}}",
        Whole("", "", [CALL, ("now", "{}")]),
    ),
    "mistral-v13, text before": (MISTRAL_V13, f"I look.{LATER_CALL}", Whole("I look.", "", [CALL])),
    "mistral-v13, unknown tool": (
        MISTRAL_V13,
        f"So [TOOL_CALLS]rm[ARGS]{PARIS} sorry",
        Whole(f"So rm{PARIS} sorry"),
    ),
    "mistral-v13, mark twice": (MISTRAL_V13, f"[TOOL_CALLS]{LATER_CALL}", Whole("", "", [CALL])),
    "mistral-v13, no arguments": (MISTRAL_V13, "[TOOL_CALLS]now[ARGS]", Whole("now")),
    "coder": (CODER, CODER_CALL, Whole("", "", [CALL])),
    "coder, text before, and two": (
        CODER,
        f"I look.\n\n{CODER_CALL}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        Whole("I look.", "", [CALL, ("now", "{}")]),
    ),
    "coder, on one line": (
        CODER,
        "<tool_call><function=get_weather><parameter=city>Paris</parameter>"
        "<parameter=days>2</parameter></function></tool_call>",
        Whole("", "", [("get_weather", '{"city": "Paris", "days": 2}')]),
    ),
    "coder, lines and quotes": (
        CODER,
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n\na "b"\n\\ </param> é🙂\n\n'
        "</parameter>\n</function>\n</tool_call> and so on",
        Whole(
            " and so on",
            "",
            [("get_weather", '{"city": "\\na \\"b\\"\\n\\\\ </param> é🙂\\n"}')],
        ),
    ),
    "coder, an empty text": (
        CODER,
        CODER_CALL.replace("\nParis\n", "\n\n"),
        Whole("", "", [("get_weather", '{"city": ""}')]),
    ),
    "coder, an unknown parameter": (
        CODER,
        CODER_CALL.replace("=city", "=town"),
        Whole("", "", [("get_weather", '{"town": "Paris"}')]),
    ),
    "coder, of no type that is allowed": (
        CODER,
        CODER_CALL.replace("=city", "=days"),
        Whole("", "", [("get_weather", '{"days": "Paris"}')]),
    ),
    "coder, unknown tool": (
        CODER,
        CODER_CALL.replace("get_weather", "rm") + " x",
        Whole(CODER_CALL.replace("get_weather", "rm") + " x"),
    ),
    "coder, JSON between the marks": (CODER, QWEN_CALL, Whole(QWEN_CALL)),
    "coder, empty marks": (
        CODER,
        f"<tool_call></tool_call>{CODER_CALL}",
        Whole("<tool_call></tool_call>", "", [CALL]),
    ),
    "coder, marks alone": (CODER, "<tool_call>\n<function=", Whole("<tool_call>\n<function=")),
    "deepseek-v3": (
        V3,
        f"<｜tool▁calls▁begin｜>{V3_CALL}\n{V3_CALL}<｜tool▁calls▁end｜>",
        Whole("", "", [CALL, CALL]),
    ),
    "deepseek-r1": (
        V3,
        f"<think>\nHm.\n</think>\n\nSo:<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁calls▁end｜>",
        Whole("So:", "Hm.", [CALL]),
    ),
    "deepseek-v3, unknown tool": (
        V3,
        V3_CALL.replace("get_weather", "rm"),
        Whole(f"functionrm\n```json\n{PARIS}\n```"),
    ),
    "deepseek-v3.1": (
        V3_1,
        f"<｜tool▁calls▁begin｜>{V3_1_CALL}{V3_1_CALL}<｜tool▁calls▁end｜>",
        Whole("", "", [CALL, CALL]),
    ),
    "gpt-oss": (GPT_OSS, f"{THOUGHT}{HARMONY_CALL}", Whole("", "Need weather.", [CALL])),
    "gpt-oss, recipient first": (
        GPT_OSS,
        f"{THOUGHT} to=functions.get_weather<|channel|>commentary json<|message|>{PARIS}<|call|>",
        Whole("", "Need weather.", [CALL]),
    ),
    "gpt-oss, answer": (
        GPT_OSS,
        f"{THOUGHT}<|channel|>final<|message|>It is fine.\n<|return|>",
        Whole("It is fine.\n", "Need weather."),
    ),
    "gpt-oss, preamble": (
        GPT_OSS,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
        f"{HARMONY_CALL}<|start|>assistant{HARMONY_CALL}",
        Whole("I look.", "", [CALL, CALL]),
    ),
    "gpt-oss, unknown tool": (
        GPT_OSS,
        HARMONY_CALL.replace("get_weather", "rm"),
        Whole(PARIS),
    ),
    "gpt-oss, no channels": (GPT_OSS, "It is fine.", Whole("It is fine.")),
    "gpt-oss, two thoughts": (
        GPT_OSS,
        f"{THOUGHT}{THOUGHT}<|channel|>final<|message|>Yes",
        Whole("Yes", "Need weather.\nNeed weather."),
    ),
}


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


VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "string"}, "5", '"5"'),
    ({"type": "string"}, "null", '"null"'),
    ({}, "5", '"5"'),
    ({"type": "integer"}, "5", "5"),
    ({"type": "integer"}, " 12 ", "12"),
    ({"type": "integer"}, "9" * 5000, "9" * 5000),
    ({"type": "integer"}, "5.0", "5.0"),
    ({"type": "integer"}, "5.5", '"5.5"'),
    ({"type": "integer"}, "five", '"five"'),
    ({"type": "number"}, "5", "5"),
    ({"type": "number"}, "NaN", '"NaN"'),
    ({"type": "boolean"}, "true", "true"),
    ({"type": "boolean"}, "False", "false"),
    ({"type": "boolean"}, "no", '"no"'),
    ({"type": ["string", "null"]}, "null", "null"),
    ({"type": ["string", "null"]}, "None", "null"),
    ({"type": ["string", "null"]}, "nothing", '"nothing"'),
    ({"type": ["string", "null"]}, "[a", '"[a"'),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "7", "7"),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, '"7"', '"\\"7\\""'),
    ({"$ref": "#/$defs/flag"}, "true", "true"),
    ({"enum": [1, "a"]}, "1", "1"),
    ({"enum": [1, "a"]}, "a", '"a"'),
    (
        {"type": "array"},
        '[1, "a</parameter>\\"b", {"c": []}]',
        '[1, "a</parameter>\\"b", {"c": []}]',
    ),
    ({"type": "array"}, '["a', '"[\\"a"'),
    ({"type": "array"}, "[" * 20_000, f'"{"[" * 20_000}"'),
    ({"type": "object"}, '{\n  "a": 1,\n  "a": 2\n}', '{\n  "a": 1,\n  "a": 2\n}'),
    ({"type": "object"}, "{'a': 1}", "\"{'a': 1}\""),
]
"""A parameter's schema, its value as a model writes it, and as JSON."""


@pytest.mark.parametrize(
    ("schema", "value", "expected"), VALUES, ids=[f"{v[0]} {v[1][:9]!r}" for v in VALUES]
)
def test_values_between_marks_have_the_types_of_the_schema(
    schema: dict[str, Any], value: str, expected: str
) -> None:
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
def test_what_is_no_json_stays_content_of_a_whole_answer(name: str) -> None:
    for pieces in cuts(BROKEN[name]):
        assert parsed(QWEN, pieces, is_held=True) == Whole(BROKEN[name], finish_reason="stop")


@pytest.mark.parametrize("name", BROKEN)
def test_a_streamed_call_that_breaks_off_is_no_end_by_calls(name: str) -> None:
    wholes = [parsed(QWEN, pieces) for pieces in cuts(BROKEN[name])]
    assert all(whole == wholes[0] for whole in wholes)
    assert wholes[0].finish_reason == "stop"
    assert len(wholes[0].calls) == 1


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


@pytest.mark.parametrize("is_held", [False, True])
def test_a_name_that_is_no_json_stays_content(is_held: bool) -> None:
    text = r'<tool_call>{"name": "\q", "arguments": {}}</tool_call>'
    for pieces in cuts(text):
        assert parsed(QWEN, pieces, is_held) == Whole(text, finish_reason="stop")


@pytest.mark.parametrize("is_held", [False, True])
def test_arguments_are_json_and_unicode_however_they_were_written(is_held: bool) -> None:
    half = r'{"city": "\ud800"}'
    as_text = json.dumps(half).replace(r"\\", "\\")  # the escape is one of the text around it
    for call in (
        f'{{"name": "get_weather", "arguments": {half}}}',
        f'{{"arguments": {half}, "name": "get_weather"}}',
        f'{{"name": "get_weather", "arguments": {as_text}}}',
    ):
        for pieces in cuts(f"<tool_call>{call}</tool_call>"):
            assert parsed(QWEN, pieces, is_held).calls == [("get_weather", half)]


TWICE = '{"city": "a", "city": "b", "days": 1, "days": 1e999}'
HUGE = f'{{"days": {"9" * 5000}}}'


@pytest.mark.parametrize("arguments", [TWICE, HUGE])
def test_arguments_are_the_models_own_text_in_whole_answers_and_streams(arguments: str) -> None:
    """Keys that come twice, and numbers that Python refuses to read, are JSON."""
    in_order = f'{{"name": "get_weather", "arguments": {arguments}}}'
    for format_, text in (
        (QWEN, f"<tool_call>{in_order}</tool_call>"),
        (QWEN, f'<tool_call>{{"arguments": {arguments}, "name": "get_weather"}}</tool_call>'),
        (QWEN, f'<tool_call>{in_order[:-1]}, "x": {HUGE}}}</tool_call>'),
        (MISTRAL, f"[TOOL_CALLS] [{in_order}]"),
        (V3_1, V3_1_CALL.replace(PARIS, arguments)),
        (GPT_OSS, HARMONY_CALL.replace(PARIS, arguments)),
    ):
        whole = parsed(format_, [text], is_held=True)
        assert whole == Whole("", "", [("get_weather", arguments)], "tool_calls")
        assert parsed(format_, [text], is_held=False) == whole
        assert parsed(format_, list(text), is_held=False) == whole


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
def test_of_members_that_come_twice_the_first_holds(
    members: str, expected: tuple[str, str] | None
) -> None:
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


class Noted(list[Any]):
    """A list that notes how often it is gone through."""

    num_times = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_times += 1
        return super().__iter__()


def test_the_schema_of_a_parameter_that_comes_often_is_gone_through_once() -> None:
    values = Noted([1, 2, "a"])
    tools = (
        tool("do", {"properties": {"a": {"enum": values}, "b": {"type": "integer"}}}),
        tool("other", {"properties": {"a": {"type": "string"}}}),
    )
    call = (
        "<tool_call><function={}>" + "<parameter={}>1</parameter>" * 3 + "</function></tool_call>"
    )
    text = call.format("do", "a", "b", "a") * 3 + call.format("other", "a", "b", "c")
    whole = parsed(CODER, [text], use=ToolUse(tools, tools))
    numbers, texts = '{"a": 1, "b": 1, "a": 1}', '{"a": "1", "b": "1", "c": "1"}'
    assert whole.calls == [*[("do", numbers)] * 3, ("other", texts)]
    assert values.num_times == 1


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
