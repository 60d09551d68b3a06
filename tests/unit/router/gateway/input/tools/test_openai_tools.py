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
    "qwen": ("qwen, text and thought", "qwen, two", "qwen, unknown tool"),
    "mixtral": ("mixtral", "mixtral, text before", "mixtral, not valid"),
    "qwen3-coder": ("coder, text before, and two", "coder, unknown tool"),
    "mistral-v11": ("mistral-v11",),
    "mistral-v13": ("mistral-v13, text before", "mistral-v13, unknown tool"),
    "deepseek-v3": ("deepseek-v3", "deepseek-v3, unknown tool"),
    "deepseek-v3.1": ("deepseek-v3.1",),
    "gpt-oss": tuple(name for name in CASES if name.startswith("gpt-oss")),
}
BOTH = [(name, case) for name, cases in OF_MODEL.items() for case in cases]


class get_weather(BaseModel):  # noqa: N801 - the name of the tool
    """Tells the weather."""

    city: str


def answer_to(upstream: FakeUpstream, model: str = "qwen", **asked: Any) -> Any:
    """Return the answer to a chat with tools, or the chunks of its stream."""

    async def asking(client: openai.AsyncOpenAI) -> Any:
        given = {"model": model, "messages": ASKED, "tools": TOOLS, **asked}
        answer = await client.chat.completions.create(**given)
        return [chunk async for chunk in answer] if asked.get("stream") else answer

    return ask(upstream, asking)


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_answers_and_streams_have_the_same_parts(name: str, case: str) -> None:
    _, text, expected = CASES[case]
    reason = "tool_calls" if expected.calls else "stop"

    async def asking(client: openai.AsyncOpenAI) -> None:
        asked: dict[str, Any] = {"model": name, "messages": ASKED, "tools": TOOLS}
        answer = await client.chat.completions.create(**asked, n=2)
        ids = set()
        for choice in answer.choices:
            message = choice.message
            assert calls_of(message) == expected.calls
            assert message.content == (expected.content or (None if expected.calls else ""))
            assert (message.model_extra or {}).get("reasoning_content", "") == expected.reasoning
            assert choice.finish_reason == reason
            ids |= {call.id for call in message.tool_calls or []}
        assert len(ids) == 2 * len(expected.calls)
        if name.startswith("mi"):
            assert all(len(each) == 9 and each.isalnum() for each in ids)
        async with client.chat.completions.stream(**asked) as stream:
            events = [event async for event in stream]
            [choice] = (await stream.get_final_completion()).choices
        assert calls_of(choice.message) == expected.calls
        assert (choice.message.content or "") == expected.content
        assert choice.finish_reason == reason
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert [(event.name, event.arguments) for event in done] == expected.calls

    ask(FakeUpstream(says(name, text)), asking)


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

    ask(upstream, asking)
    ids = upstream.requests[-1].prompt_token_ids
    prompt = chat_models.model("qwen").tokenizer.whole_text(ids)
    assert f"{QWEN_CALL}<|im_end|>" in prompt
    assert "<tool_response>\nfine\n</tool_response>" in prompt


def test_deltas_are_as_openais() -> None:
    upstream = FakeUpstream(says("qwen", f"<think>\nHm.\n</think>\n\nSo:\n{QWEN_CALL}"))
    chunks = answer_to(upstream, stream=True, stream_options={"include_usage": True})
    assert chunks[-1].usage.completion_tokens > 10
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert (calls[0].index, calls[0].type, calls[0].function.name) == (0, "function", "get_weather")
    assert calls[0].id.startswith("call_")
    assert len(calls) > 3
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
    reasoning = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(reasoning) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "So:"
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


def test_a_call_cut_short_is_no_end_by_calls() -> None:
    text = QWEN_CALL[:-20]
    [choice] = answer_to(FakeUpstream(says("qwen", text, "length"))).choices
    assert (choice.finish_reason, choice.message.content) == ("length", text)
    chunks = answer_to(FakeUpstream(says("qwen", text, "length")), stream=True)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_one_call_ends_a_choice_without_parallel_calls(is_parallel: bool, stream: bool) -> None:
    """Tokens of a whole answer must come early too, or the model would go on to its own end."""
    upstream = FakeUpstream(says("qwen", f"{QWEN_CALL}\n{QWEN_CALL}"))
    told = answer_to(upstream, parallel_tool_calls=is_parallel, stream=stream)
    assert len(upstream.stopped) == (not is_parallel)
    assert upstream.requests[-1].streamed == (stream or not is_parallel)
    if stream:
        calls = [c for chunk in told for c in chunk.choices[0].delta.tool_calls or []]
        assert {call.index for call in calls} == ({0, 1} if is_parallel else {0})
        assert told[-1].choices[0].finish_reason == "tool_calls"
    else:
        num_tokens = len(chat_models.model("qwen").tokenizer.encode(QWEN_CALL, False))
        assert (told.usage.completion_tokens < num_tokens + 3) == (not is_parallel)


def test_calls_have_ids_of_their_own_whatever_id_a_client_gives_its_requests() -> None:
    upstream = FakeUpstream(says("qwen", QWEN_CALL))
    headers = {"X-Request-Id": "conversation-7"}
    first, second = (answer_to(upstream, extra_headers=headers).choices[0] for _ in range(2))
    assert first.message.tool_calls[0].id != second.message.tool_calls[0].id


def test_none_leaves_tools_out() -> None:
    upstream = FakeUpstream(says("gpt-oss", f"{THOUGHT}{HARMONY_CALL}"))
    message = answer_to(upstream, "gpt-oss", tool_choice="none").choices[0].message
    assert (message.content, message.tool_calls) == ('{"city": "Paris"}', None)
    assert message.reasoning_content == "Need weather."
    ids = upstream.requests[-1].prompt_token_ids
    assert "get_weather" not in chat_models.model("gpt-oss").tokenizer.whole_text(ids)


def test_stop_strings_and_token_ids_go_on_working() -> None:
    upstream = FakeUpstream(says("qwen", f"So it goes {QWEN_CALL}"))
    body = {"return_token_ids": True}
    [choice] = answer_to(upstream, stop=" goes", extra_body=body).choices
    assert (choice.message.content, choice.finish_reason) == ("So it", "stop")
    assert choice.model_extra["token_ids"]
