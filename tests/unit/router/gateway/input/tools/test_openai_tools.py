"""The real ``openai`` client with tools, over scripted answers in each family's format."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.unit.gateway_fakes import FakeUpstream
from tests.unit.router.gateway.input.tools import chat_models
from tests.unit.router.gateway.input.tools.answers import NOW, WEATHER
from tests.unit.router.gateway.input.tools.chat_models import ask, says
from tests.unit.router.gateway.input.tools.test_parsers import (
    CASES,
    HARMONY_CALL,
    QWEN_CALL,
    THOUGHT,
)

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "time", "parameters": NOW}},
]
ASKED: list[Any] = [{"role": "user", "content": "How is Paris?"}]
OF_MODEL = {
    "qwen": ("qwen", "qwen, text and thought", "qwen, two", "qwen, unknown tool"),
    "mixtral": ("mixtral", "mixtral, text before", "mixtral, not valid"),
    "qwen3-coder": tuple(name for name in CASES if name.startswith("coder")),
    "mistral-v11": ("mistral-v11",),
    "mistral-v13": ("mistral-v13", "mistral-v13, text before", "mistral-v13, unknown tool"),
    "deepseek-v3": ("deepseek-v3", "deepseek-v3, unknown tool"),
    "deepseek-v3.1": ("deepseek-v3.1",),
    "gpt-oss": tuple(name for name in CASES if name.startswith("gpt-oss")),
}
BOTH = [(name, case) for name, cases in OF_MODEL.items() for case in cases]


class get_weather(BaseModel):  # noqa: N801 - the name of the tool
    """Tells the weather."""

    city: str


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_answers_and_streams_have_the_same_parts(name: str, case: str) -> None:
    _, text, expected = CASES[case]
    upstream = FakeUpstream(says(name, text))

    async def asking(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model=name, messages=ASKED, tools=TOOLS, n=2)
        ids = set()
        for choice in answer.choices:
            message = choice.message
            calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]  # type: ignore[union-attr]
            assert calls == expected.calls
            assert message.content == (expected.content or (None if calls else ""))
            assert (message.model_extra or {}).get("reasoning_content", "") == expected.reasoning
            assert choice.finish_reason == ("tool_calls" if calls else "stop")
            ids |= {call.id for call in message.tool_calls or []}
        assert len(ids) == 2 * len(expected.calls)
        if name.startswith("mi"):
            assert all(len(each) == 9 and each.isalnum() for each in ids)
        async with client.chat.completions.stream(
            model=name, messages=ASKED, tools=TOOLS
        ) as stream:
            events = [event async for event in stream]
            whole = await stream.get_final_completion()
        [choice] = whole.choices
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
        assert calls == expected.calls
        assert (choice.message.content or "") == expected.content
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert [(event.name, event.arguments) for event in done] == expected.calls

    ask(upstream, asking)


def test_the_helpers_for_tools_work_unchanged() -> None:
    upstream = FakeUpstream(says("qwen", QWEN_CALL))
    tools = [openai.pydantic_function_tool(get_weather)]

    async def asking(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.parse(model="qwen", messages=ASKED, tools=tools)
        message = answer.choices[0].message
        [call] = message.tool_calls or []
        assert call.function.parsed_arguments == get_weather(city="Paris")
        assert upstream.requests[-1].sampling.grammar  # the helper's tools are strict
        result = {"role": "tool", "tool_call_id": call.id, "content": "fine"}
        conversation: list[Any] = [*ASKED, message, result]
        again = await client.chat.completions.parse(
            model="qwen", messages=conversation, tools=tools
        )
        assert again.choices[0].message.tool_calls
        ids = upstream.requests[-1].prompt_token_ids
        prompt = chat_models.model("qwen").tokenizer.whole_text(ids)
        assert f"{QWEN_CALL}<|im_end|>" in prompt
        assert "<tool_response>\nfine\n</tool_response>" in prompt
        async with client.chat.completions.stream(
            model="qwen", messages=ASKED, tools=tools
        ) as stream:
            events = [event async for event in stream]
        deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
        assert len(deltas) > 2
        [done] = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert done.parsed_arguments == get_weather(city="Paris")

    ask(upstream, asking)


def test_deltas_are_as_openais() -> None:
    upstream = FakeUpstream(says("qwen", f"<think>\nHm.\n</think>\n\nSo:\n{QWEN_CALL}"))

    async def asking(client: openai.AsyncOpenAI) -> list[Any]:
        stream = await client.chat.completions.create(
            model="qwen", messages=ASKED, tools=TOOLS, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        return [chunk async for chunk in stream]

    chunks = ask(upstream, asking)
    assert chunks[-1].usage.completion_tokens > 10
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert (calls[0].index, calls[0].type, calls[0].function.name) == (0, "function", "get_weather")
    assert calls[0].id.startswith("call_")
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
    reasoning = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(reasoning) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "So:"
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


def test_a_call_cut_short_is_no_end_by_calls() -> None:
    text = QWEN_CALL[:-20]
    upstream = FakeUpstream(says("qwen", text, "length"))

    async def asking(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model="qwen", messages=ASKED, tools=TOOLS)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == text
        stream = await client.chat.completions.create(
            model="qwen", messages=ASKED, tools=TOOLS, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)

    ask(upstream, asking)


def test_one_call_ends_the_choice_where_calls_are_not_parallel() -> None:
    upstream = FakeUpstream(says("qwen", f"{QWEN_CALL}\n{QWEN_CALL}"))

    async def asking(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="qwen", messages=ASKED, tools=TOOLS, stream=True, parallel_tool_calls=False
        )
        chunks = [chunk async for chunk in stream]
        calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        assert {call.index for call in calls} == {0}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    ask(upstream, asking)
    assert len(upstream.stopped) == 1


@pytest.mark.parametrize("is_parallel", [True, False])
def test_a_whole_answer_of_one_call_is_stopped_after_it(is_parallel: bool) -> None:
    """Its tokens must come early, or the model would go on to its own end."""
    upstream = FakeUpstream(says("qwen", f"{QWEN_CALL}\n{QWEN_CALL}"))

    async def asking(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="qwen", messages=ASKED, tools=TOOLS, parallel_tool_calls=is_parallel
        )

    whole = ask(upstream, asking)
    assert upstream.requests[-1].streamed == (not is_parallel)
    assert len(upstream.stopped) == (not is_parallel)
    num_tokens = len(chat_models.model("qwen").tokenizer.encode(QWEN_CALL, False))
    assert (whole.usage.completion_tokens < num_tokens + 3) == (not is_parallel)


def test_calls_have_ids_of_their_own_whatever_id_a_client_gives_its_requests() -> None:
    upstream = FakeUpstream(says("qwen", QWEN_CALL))

    async def asking(client: openai.AsyncOpenAI) -> Any:
        answers = [
            await client.chat.completions.create(
                model="qwen", messages=ASKED, tools=TOOLS,
                extra_headers={"X-Request-Id": "conversation-7"},
            )
            for _ in range(2)
        ]  # fmt: skip
        return [answer.choices[0].message.tool_calls[0].id for answer in answers]

    first, second = ask(upstream, asking)
    assert first != second


def test_none_leaves_tools_out() -> None:
    upstream = FakeUpstream(says("gpt-oss", f"{THOUGHT}{HARMONY_CALL}"))

    async def asking(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="gpt-oss", messages=ASKED, tools=TOOLS, tool_choice="none"
        )

    message = ask(upstream, asking).choices[0].message
    assert (message.content, message.tool_calls) == ('{"city": "Paris"}', None)
    assert message.reasoning_content == "Need weather."
    prompt = chat_models.model("gpt-oss").tokenizer.whole_text(
        upstream.requests[-1].prompt_token_ids
    )
    assert "get_weather" not in prompt


def test_log_probabilities_stop_strings_and_token_ids_go_on_working() -> None:
    upstream = FakeUpstream(says("qwen", f"So it goes {QWEN_CALL}"))

    async def asking(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="qwen", messages=ASKED, tools=TOOLS, stop=" goes",
            extra_body={"return_token_ids": True},
        )  # fmt: skip

    [choice] = ask(upstream, asking).choices
    assert (choice.message.content, choice.finish_reason) == ("So it", "stop")
    assert choice.model_extra["token_ids"]
