"""Prompts with tools, calls and options, as each family's template wants them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.gateway_fakes import FakeUpstream
from tests.unit.router.gateway.tools.chat_models import model, says
from tests.unit.router.gateway.tools.test_refusals import CALL, TOOL, USER, post

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
        "<tool_response>\nfine\n</tool_response>",
    ),
    "mixtral": (
        "[AVAILABLE_TOOLS] [",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]</s>',
        "[TOOL_RESULTS] fine[/TOOL_RESULTS]",
    ),
    "deepseek-v3": (
        '"name": "get_weather", "parameters":',
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>',
        "<｜tool▁output▁begin｜>fine<｜tool▁output▁end｜>",
    ),
    "deepseek-v3.1": (
        '"name": "get_weather", "parameters":',
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>',
        "<｜tool▁output▁begin｜>fine<｜tool▁output▁end｜>",
    ),
    "gpt-oss": (
        '"name": "get_weather", "parameters":',
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        '{"city": "Paris"}<|call|>',
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>fine<|end|>",
    ),
}


def prompt_of(name: str, **body: Any) -> str:
    """The prompt of one request."""
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


def test_reasoning_that_the_prompt_opens_is_told_apart() -> None:
    upstream = FakeUpstream(says("qwen", "Hm.\n</think>\n\nYes"))
    options = {"enable_thinking": "always"}
    message = post("qwen", upstream, chat_template_kwargs=options).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm.")
    plain = post("plain", FakeUpstream(says("plain", "<think>a</think>b"))).json()
    assert plain["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert "reasoning_content" not in plain["choices"][0]["message"]
