"""Prompts with tools, calls and options, as each family's template wants them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from router.gateway.input.tools.formats import format_of
from router.gateway.input.tools.template import ChatTemplate
from tests.unit.gateway_fakes import FakeUpstream
from tests.unit.router.gateway.input.tools import chat_models
from tests.unit.router.gateway.input.tools.answers import HARMONY
from tests.unit.router.gateway.input.tools.chat_models import model, says
from tests.unit.router.gateway.input.tools.test_parsers import (
    CODER_CALL,
    LATER_CALL,
    V3_1_CALL,
    V3_CALL,
)
from tests.unit.router.gateway.input.tools.test_refusals import CALL, TOOL, USER, post

RESULT = {"role": "tool", "tool_call_id": CALL["id"], "content": "fine"}
TURN: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    RESULT,
]
EXPECTED = {
    "qwen": (
        '"name": "get_weather", "parameters":',
        '<think>\nHm.\n</think>\n\n\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Paris"}}\n</tool_call><|im_end|>\n',
        "<tool_response>\nfine\n</tool_response>"),
    "mixtral": (
        "[AVAILABLE_TOOLS] [",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]</s>',
        "[TOOL_RESULTS] fine[/TOOL_RESULTS]"),
    "qwen3-coder": (
        "<name>get_weather</name>", f"{CODER_CALL}<|im_end|>",
        "<tool_response>\nfine\n</tool_response>"),
    "mistral-v11": (
        "[AVAILABLE_TOOLS][",
        '[TOOL_CALLS]get_weather[CALL_ID]call00001[ARGS]{"city": "Paris"}</s>',
        "[TOOL_RESULTS]call00001[TOOL_CONTENT]fine[/TOOL_RESULTS]"),
    "mistral-v13": (
        "[AVAILABLE_TOOLS][", f"{LATER_CALL}</s>",
        "[TOOL_RESULTS]call00001[TOOL_CONTENT]fine[/TOOL_RESULTS]"),
    "deepseek-v3": (
        '"name": "get_weather", "parameters":', V3_CALL,
        "<｜tool▁output▁begin｜>fine<｜tool▁output▁end｜>"),
    "deepseek-v3.1": (
        '"name": "get_weather", "parameters":', V3_1_CALL,
        "<｜tool▁output▁begin｜>fine<｜tool▁output▁end｜>"),
    "gpt-oss": (
        '"name": "get_weather", "parameters":',
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Paris"}<|call|>',
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>fine<|end|>"),
}  # fmt: skip


def prompt_of(name: str, **body: Any) -> str:
    upstream = FakeUpstream(says(name, "x"))
    answer = post(name, upstream, **body)
    assert answer.status_code == 200, answer.text
    return model(name).tokenizer.whole_text(upstream.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("name", EXPECTED)
def test_tools_calls_and_results_are_in_the_prompt(name: str) -> None:
    prompt = prompt_of(name, messages=TURN, tools=[TOOL])
    places = [prompt.index(part) for part in EXPECTED[name]]
    assert places == sorted(places)


def test_arguments_that_are_no_object_stay_a_text() -> None:
    call = {**CALL, "function": {"name": "get_weather", "arguments": "{broken"}}
    prompt = prompt_of("qwen", messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    assert '"arguments": "{broken"}' in prompt


def test_options_reach_the_template() -> None:
    closed = prompt_of("qwen", chat_template_kwargs={"enable_thinking": False})
    assert closed.endswith("<think>\n\n</think>\n\n")
    assert prompt_of("deepseek-v3.1", chat_template_kwargs={"thinking": True}).endswith("<think>")
    assert "Reasoning: high" in prompt_of("gpt-oss", reasoning_effort="high")
    assert "Reasoning: medium" in prompt_of("gpt-oss")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in EXPECTED),
        ("qwen", {"enable_thinking": False}),
        ("deepseek-v3.1", {"thinking": True}),
        ("gpt-oss", {"reasoning_effort": "high"}),
    ],
)
def test_tokenize_counts_the_tokens_of_the_chat_request(name: str, options: dict[str, Any]) -> None:
    body = {"messages": TURN, "tools": [TOOL], "chat_template_kwargs": options}
    told = post(name, path="/tokenize", **body).json()
    upstream = FakeUpstream(says(name, "x"))
    assert post(name, upstream, **body).json()["usage"]["prompt_tokens"] == told["count"]
    assert tuple(told["tokens"]) == tuple(upstream.requests[-1].prompt_token_ids)
    assert post(name, path="/tokenize", messages=TURN).json()["count"] < told["count"]


OVER_LINES = """
{{- '[TOOL_CALLS]' + call.function.name }}
{%- if call.id is not defined %}{{ raise_exception('no id') }}{% endif %}
{{- '[CALL_ID]' + call.id }}
{{- '[ARGS]' + call.function.arguments | tojson }}
"""
AT_RESULTS = (
    "{{ '[TOOL_RESULTS][CALL_ID]' + id }}{{ '[TOOL_CALLS]' + name }}{{ '[ARGS]' + arguments }}"
)


@pytest.mark.parametrize(
    ("template", "calls"),
    [
        *((chat_models.SPECIAL[name][0], kind) for name, kind in chat_models.KINDS.items()),
        (OVER_LINES, "mistral_v11"),
        (AT_RESULTS, "mistral_v13"),
        ("<tool_call>{{ name }}<arg_key>{{ key }}</arg_key>", ""),
    ],
)
def test_a_template_tells_how_calls_are_written(template: str, calls: str) -> None:
    found = format_of(template, dict.fromkeys(HARMONY, 5), (), ())
    assert found.calls == calls
    assert bool(found.reason) == (calls == "")


OWN_NAMES = """
{%- macro shown(part, mark) %}{{ mark ~ part.text ~ style }}{% endmacro %}
{%- set date = date | default('today') %}{% set count = 0 %}
{%- if lang is not defined %}{% set lang = 'en' %}{% endif %}
{%- for role, m in messages if role != 'x' %}{% if m.skipped %}{% continue %}{% endif %}
{%- generation -%}{{ shown(m, bos_token) ~ lang ~ count }}{% endgeneration %}{% endfor %}{{ date }}
"""
"""A template with variables of its own, transformers' marks of an assistant's text, a loop's."""


OWN = ("part", "mark", "m", "role", "count", "shown", "text", "skipped", "messages", "loop")


def test_what_a_template_reads_of_its_input_is_an_option_and_no_variable_of_its_own() -> None:
    template = ChatTemplate(OWN_NAMES, lambda *_: "")
    for name in ("style", "date", "lang"):
        assert template.check_options({name: "x"}) == {name: "x"}
    for name in OWN:
        with pytest.raises(InvalidRequestError) as refused:
            template.check_options({name: "x"})
        assert refused.value.field == f"chat_template_kwargs.{name}"


def test_reasoning_that_the_prompt_opens_is_told_apart() -> None:
    upstream = FakeUpstream(says("qwen", "Hm.\n</think>\n\nYes"))
    options = {"enable_thinking": "always"}
    message = post("qwen", upstream, chat_template_kwargs=options).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm.")
    plain = post("plain", FakeUpstream(says("plain", "<think>a</think>b"))).json()
    assert plain["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert "reasoning_content" not in plain["choices"][0]["message"]
