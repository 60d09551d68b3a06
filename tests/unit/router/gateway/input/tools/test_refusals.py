"""What chat requests with tools are refused for, each with the place of the part at fault."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import pytest

from router.gateway.input.tools.template import ChatTemplate
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
    app = http_app(
        upstream or FakeUpstream(says(name, "x")), models={each: model(each) for each in SPECIAL}
    )

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": name, "messages": [USER], **body})

    return asyncio.run(send())


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {**TOOL["function"], **fields}}]


def messages(*more: Any) -> list[dict[str, Any]]:
    return [USER, *more]


def of_assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def called(**fields: Any) -> dict[str, Any]:
    return of_assistant(tool_calls=[{**CALL, **fields}])


DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BAD_TOOLS: dict[str, list[Any]] = {
    "": [5, [TOOL] * 129, function(description="x" * 300_000)],
    "[0]": [["x"]],
    "[0].type": [[{"type": "custom", "function": TOOL["function"]}], [{**TOOL, "type": None}]],
    "[0].function": [[{"type": "function"}]],
    "[0].x": [[{**TOOL, "x": 1}]],
    "[0].function.name": [
        [{"type": "function", "function": {}}],
        *(function(name=bad) for bad in ("a b", "a" * 65, 5, "now\n")),
    ],
    "[1].function.name": [[TOOL, *function(name="")], [TOOL, TOOL]],
    "[0].function.strict": [function(strict="yes")],
    "[0].function.x": [function(x=1)],
    "[0].function.parameters": [
        function(parameters=bad)
        for bad in ([], {"type": "nothing"}, {"if": {}, "then": {}}, {"$ref": "#"}, DEEP)
    ],
    "[0].function.parameters.type": [function(parameters={"type": "string"})],
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
BAD_CHOICES: dict[str, list[Any]] = {
    "": ["any", 5],
    ".type": [{"type": "tool"}],
    ".function": [{"type": "function"}],
    ".function.name": [{"type": "function", "function": {"name": "rm"}}],
    ".function.x": [{"type": "function", "function": {"name": "get_weather", "x": 1}}],
    ".x": [{**NAMED, "x": 1}],
    ".allowed_tools": [{"type": "allowed_tools"}],
    **{
        f".allowed_tools.{name}": [{"type": "allowed_tools", "allowed_tools": wrong}]
        for name, wrong in (
            ("mode", {"mode": "all", "tools": [TOOL]}),
            ("tools", {"mode": "auto", "tools": []}),
        )
    },
}
BAD_OPTIONS: dict[str, list[Any]] = {
    "": [5, {f"a{i}": 1 for i in range(17)}],
    **{f".{name}": [{name: True}] for name in ("m", "call", "tojson", "thinking_mode", "tools")},
    ".enable_thinking": [
        {"enable_thinking": bad} for bad in ([], "x" * 300, 2**31, -(2**31), 1e10)
    ],
}
BAD_MESSAGES: dict[str, list[Any]] = {
    ".tool_calls": [
        of_assistant(tool_calls=[]),
        of_assistant(tool_calls="x"),
        {"role": "user", "content": "x", "tool_calls": [CALL]},
    ],
    ".tool_calls[0]": [of_assistant(tool_calls=["x"])],
    ".content": [of_assistant(), {"role": "tool", "tool_call_id": "x", "content": 5}],
    ".reasoning_content": [of_assistant(content="x", reasoning_content=5)],
    ".tool_calls[0].id": [called(id=5), called(id="x" * 257)],
    ".tool_calls[0].x": [called(x=1)],
    ".tool_calls[0].function.name": [called(function={"arguments": "{}"})],
    ".tool_calls[0].function.arguments": [called(function={"name": "f", "arguments": {}})],
    ".tool_call_id": [{"role": "tool", "content": "x"}],
}
OF_TOKENIZE: list[tuple[dict[str, Any], str]] = [
    *(({"tools": bad}, f"tools{place}") for place in BAD_TOOLS for bad in BAD_TOOLS[place]),
    *(
        ({"chat_template_kwargs": bad}, f"chat_template_kwargs{place}")
        for place in BAD_OPTIONS
        for bad in BAD_OPTIONS[place]
    ),
]
BAD: list[tuple[dict[str, Any], str]] = [
    *OF_TOKENIZE,
    *(
        ({"tools": [TOOL], "tool_choice": bad}, f"tool_choice{place}")
        for place in BAD_CHOICES
        for bad in BAD_CHOICES[place]
    ),
    *(
        ({"messages": messages(bad)}, f"messages[1]{place}")
        for place in BAD_MESSAGES
        for bad in BAD_MESSAGES[place]
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_the_place_at_fault_is_named(body: dict[str, Any], param: str) -> None:
    upstream = FakeUpstream(says("qwen", "x"))
    refusal(post("qwen", upstream, **body), 400, param)
    assert upstream.requests == []


@pytest.mark.parametrize(("body", "param"), OF_TOKENIZE)
def test_tokenize_refuses_the_same_by_the_same_name(body: dict[str, Any], param: str) -> None:
    refusal(post("qwen", path="/tokenize", **body), 400, param)


def test_tools_that_a_model_cannot_show_are_refused() -> None:
    for path in (CHAT, "/tokenize"):
        answer = post("plain", path=path, tools=[TOOL])
        assert "does not support tools" in refusal(answer, 400, "tools")
    answer = post("plain", messages=messages(called()))
    assert "does not support tool calls" in refusal(answer, 400, "messages[1]")
    assert post("plain", tools=[], tool_choice="none").status_code == 200


def test_a_schemas_keyword_is_named() -> None:
    parameters = {"type": "object", "properties": {"a": {"if": {"type": "string"}, "then": False}}}
    answer = post(tools=function(parameters=parameters))
    assert "if" in refusal(answer, 400, "tools[0].function.parameters")


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
    assert post("deepseek-v3", messages=messages(called())).status_code == 200
    both = messages(of_assistant(content="So:", tool_calls=[CALL]))
    answer = post("deepseek-v3", messages=both)
    assert "is dropped by" in refusal(answer, 400, "messages[1].tool_calls[0]")


def test_a_conversation_that_calls_very_many_functions_is_refused_at_once() -> None:
    turns = [
        [{**CALL, "function": {"name": f"f{i}_{j}", "arguments": "{}"}} for j in range(128)]
        for i in range(80)
    ]
    many = messages(*(of_assistant(tool_calls=calls) for calls in turns))
    begun_s = time.process_time()
    assert "10240 functions" in refusal(post(messages=many), 400, "messages")
    assert time.process_time() - begun_s < 3


@pytest.mark.parametrize("depth", [500, 990, 5000, 100_000])
def test_deep_arguments_end_in_an_answer(depth: int) -> None:
    text = '{"a":' * depth + "1" + "}" * depth
    for name in ("qwen", "deepseek-v3"):
        deep = called(function={"name": "get_weather", "arguments": text})
        assert post(name, messages=messages(deep)).status_code in (200, 400)


def test_a_templates_own_refusal_is_told() -> None:
    answer = post("mixtral", messages=messages(called(id="call_1")))
    assert "ids have length 9" in refusal(answer, 400, "messages")


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_calls_are_rendered_beside_the_event_loop(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body has room for many thousands of calls, which take seconds."""
    threads: list[int] = []
    rendered = ChatTemplate.prompt

    def noted(*given: Any) -> str:
        threads.append(threading.get_ident())
        return rendered(*given)

    monkeypatch.setattr(ChatTemplate, "prompt", noted)
    for given in ([USER], messages(called(), USER)):
        assert post(path=path, messages=given).status_code == 200
    plain, of_calls = threads
    assert plain == threading.get_ident() != of_calls
