"""What chat requests with tools are refused for, each with the place of the part at fault."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from router.gateway.input.tokenizer import Tokenizer
from tests.unit.gateway_fakes import FakeUpstream, http_app
from tests.unit.http_calls import CHAT, refusal
from tests.unit.router.gateway.input.tools.answers import WEATHER
from tests.unit.router.gateway.input.tools.chat_models import SPECIAL, model, says

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": WEATHER},
}
USER = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}


def post(
    name: str = "qwen", upstream: FakeUpstream | None = None, path: str = CHAT, **body: Any
) -> httpx.Response:
    """The answer to one request."""
    import asyncio

    app = http_app(
        upstream or FakeUpstream(says(name, "x")), models={each: model(each) for each in SPECIAL}
    )

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": name, "messages": [USER], **body})

    return asyncio.run(send())


def function(**fields: Any) -> list[dict[str, Any]]:
    """A list of one tool, with other fields."""
    return [{"type": "function", "function": {**TOOL["function"], **fields}}]


def choice(**fields: Any) -> dict[str, Any]:
    """A body with one tool and a choice."""
    return {"tools": [TOOL], "tool_choice": fields}


def assistant(**fields: Any) -> dict[str, Any]:
    """A body with an assistant's message and a tool's."""
    return {"messages": [USER, {"role": "assistant", **fields}]}


def called(**fields: Any) -> dict[str, Any]:
    """A body with a message of one call, some of it other."""
    return assistant(tool_calls=[{**CALL, **fields}])


DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": 5}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": function(description="x" * 300_000)}, "tools"),
    ({"tools": ["x"]}, "tools[0]"),
    ({"tools": [{"type": "custom", "function": TOOL["function"]}]}, "tools[0].type"),
    ({"tools": [{"function": TOOL["function"]}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{**TOOL, "x": 1}]}, "tools[0].x"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, *function(name="")]}, "tools[1].function.name"),
    ({"tools": function(name="a b")}, "tools[0].function.name"),
    ({"tools": function(name="a" * 65)}, "tools[0].function.name"),
    ({"tools": function(name=5)}, "tools[0].function.name"),
    ({"tools": function(name="now\n")}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": function(description=5)}, "tools[0].function.description"),
    ({"tools": function(strict="yes")}, "tools[0].function.strict"),
    ({"tools": function(x=1)}, "tools[0].function.x"),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"type": "string"})}, "tools[0].function.parameters.type"),
    ({"tools": function(parameters={"type": "nothing"})}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"if": {}, "then": {}})}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"$ref": "#"})}, "tools[0].function.parameters"),
    ({"tools": function(parameters=DEEP)}, "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
    (choice(type="tool"), "tool_choice.type"),
    (choice(type="function"), "tool_choice.function"),
    (choice(type="function", function={"name": "rm"}), "tool_choice.function.name"),
    (choice(type="function", function={"name": "get_weather", "x": 1}), "tool_choice.function.x"),
    (choice(type="function", function={"name": "get_weather"}, x=1), "tool_choice.x"),
    (choice(type="allowed_tools"), "tool_choice.allowed_tools"),
    (
        choice(type="allowed_tools", allowed_tools={"mode": "all", "tools": [TOOL]}),
        "tool_choice.allowed_tools.mode",
    ),
    (
        choice(type="allowed_tools", allowed_tools={"mode": "auto", "tools": []}),
        "tool_choice.allowed_tools.tools",
    ),
    ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"functions": [TOOL["function"]]}, "functions"),
    ({"function_call": {"name": "x"}}, "function_call"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking_mode": True}}, "chat_template_kwargs.thinking_mode"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    *(
        ({"chat_template_kwargs": {name: 1}}, f"chat_template_kwargs.{name}")
        for name in ("m", "call", "function", "tojson", "length")
    ),
    ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs.enable_thinking"),
    (
        {"chat_template_kwargs": {"enable_thinking": "x" * 300}},
        "chat_template_kwargs.enable_thinking",
    ),
    *(
        (
            {"chat_template_kwargs": {"enable_thinking": wrong}},
            "chat_template_kwargs.enable_thinking",
        )
        for wrong in (2**31, -(2**31), 1e10)
    ),
    ({"chat_template_kwargs": {f"a{i}": 1 for i in range(17)}}, "chat_template_kwargs"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    (assistant(tool_calls=[]), "messages[1].tool_calls"),
    (assistant(tool_calls="x"), "messages[1].tool_calls"),
    (assistant(tool_calls=["x"]), "messages[1].tool_calls[0]"),
    (assistant(), "messages[1].content"),
    (assistant(content="x", reasoning_content=5), "messages[1].reasoning_content"),
    (called(id=5), "messages[1].tool_calls[0].id"),
    (called(id="x" * 257), "messages[1].tool_calls[0].id"),
    (called(type="x"), "messages[1].tool_calls[0].type"),
    (called(x=1), "messages[1].tool_calls[0].x"),
    (called(function={"arguments": "{}"}), "messages[1].tool_calls[0].function.name"),
    (
        called(function={"name": "f", "arguments": {}}),
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [USER, {"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages[1].tool_calls",
    ),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    (
        {"messages": [USER, {"role": "tool", "tool_call_id": "x", "content": 5}]},
        "messages[1].content",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_the_place_at_fault_is_named(body: dict[str, Any], param: str) -> None:
    upstream = FakeUpstream(says("qwen", "x"))
    refusal(post("qwen", upstream, **body), 400, param)
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("body", "param"), [pair for pair in BAD if {*pair[0]} <= {"tools", "chat_template_kwargs"}]
)
def test_tokenize_refuses_the_same_by_the_same_name(body: dict[str, Any], param: str) -> None:
    refusal(post("qwen", path="/tokenize", **body), 400, param)


def test_tools_that_a_model_cannot_show_are_refused() -> None:
    for path in (CHAT, "/tokenize"):
        assert "does not support tools" in refusal(
            post("plain", path=path, tools=[TOOL]), 400, "tools"
        )
    body = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
    assert "does not support tool calls" in refusal(post("plain", **body), 400, "messages[1]")
    assert post("plain", tools=[], tool_choice="none").status_code == 200


def test_a_schemas_keyword_is_named() -> None:
    parameters = {"type": "object", "properties": {"a": {"if": {"type": "string"}, "then": False}}}
    message = refusal(
        post(tools=function(parameters=parameters)), 400, "tools[0].function.parameters"
    )
    assert "if" in message


def test_many_large_tools_are_refused_in_bounded_time() -> None:
    parameters = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": "[a-z]{1,50}"} for i in range(30)},
    }
    tools = [function(name=f"t{i}", parameters=parameters)[0] for i in range(45)]
    begun_s = time.process_time()
    answer = post(tools=tools, tool_choice="required")
    assert time.process_time() - begun_s < 10
    refusal(answer, 400, "tools")
    assert "65536 bytes" in answer.text
    assert len(json.dumps(tools)) < 256 << 10


def test_a_call_that_a_template_leaves_out_is_refused() -> None:
    """DeepSeek-V3's template writes calls only where there is no content."""
    good = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
    assert post("deepseek-v3", **good).status_code == 200
    both = {"messages": [USER, {"role": "assistant", "content": "So:", "tool_calls": [CALL]}]}
    message = refusal(post("deepseek-v3", **both), 400, "messages[1].tool_calls[0]")
    assert "is dropped by" in message


def test_a_conversation_that_calls_very_many_functions_is_refused_at_once() -> None:
    calls = [
        {**CALL, "function": {"name": f"f{i}_{j}", "arguments": "{}"}}
        for i in range(80)
        for j in range(128)
    ]
    messages: list[Any] = [USER]
    messages += [
        {"role": "assistant", "tool_calls": calls[place : place + 128]}
        for place in range(0, len(calls), 128)
    ]
    begun_s = time.process_time()
    assert "10240 functions" in refusal(post(messages=messages), 400, "messages")
    assert time.process_time() - begun_s < 3


@pytest.mark.parametrize("depth", [500, 990, 5000, 100_000])
def test_deep_arguments_end_in_an_answer(depth: int) -> None:
    text = '{"a":' * depth + "1" + "}" * depth
    for name in ("qwen", "deepseek-v3"):
        call = {**CALL, "function": {"name": "get_weather", "arguments": text}}
        messages = [USER, {"role": "assistant", "tool_calls": [call]}]
        assert post(name, messages=messages).status_code in (200, 400)


def test_a_templates_own_refusal_is_told() -> None:
    long_id = {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": "call_1"}]}]}
    assert "ids have length 9" in refusal(post("mixtral", **long_id), 400, "messages")


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_conversations_with_calls_are_rendered_beside_the_event_loop(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body has room for many thousands of calls, which take seconds."""
    threads: list[int] = []
    rendered = Tokenizer.chat_prompt

    def noted(*given: Any) -> str:
        threads.append(threading.get_ident())
        return rendered(*given)

    monkeypatch.setattr(Tokenizer, "chat_prompt", noted)
    with_calls = [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]
    for messages in ([USER], with_calls):
        assert post(path=path, messages=messages).status_code == 200
    plain, of_calls = threads
    assert plain == threading.get_ident() != of_calls
