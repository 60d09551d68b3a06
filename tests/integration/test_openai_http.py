"""The HTTP surface as its users have it: the openai client, httpx, and what an operator asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
import torch

from tests.cluster_fixture import RANDOM, RANDOM_CONTEXT, TINY, ServedCluster, prompt_of

HELLO = [{"role": "user", "content": "Who made the heaven?"}]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def api(served: ServedCluster) -> Iterator[openai.OpenAI]:
    """The real client, without its retries."""
    url = f"{served.http_url}/v1"
    with openai.OpenAI(api_key="none", base_url=url, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def http(served: ServedCluster) -> Iterator[httpx.Client]:
    """Plain HTTP."""
    with httpx.Client(base_url=served.http_url, timeout=30) as client:
        yield client


def test_models_are_listed_with_their_context(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [TINY, RANDOM]
    assert api.models.retrieve(RANDOM).to_dict()["max_model_len"] == RANDOM_CONTEXT


def test_a_text_completion_counts_its_tokens(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model=TINY, prompt="In the beginning", max_tokens=7, temperature=0, extra_body=GREEDY
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_a_priority_changes_no_token(api: openai.OpenAI) -> None:
    texts = {
        api.completions.create(
            model=TINY,
            prompt="In the beginning",
            max_tokens=7,
            temperature=0,
            extra_body={**GREEDY, "priority": priority},
        )
        .choices[0]
        .text
        for priority in (0, -(2**63), 2**63 - 1)
    }
    assert len(texts) == 1


def test_a_prompt_that_came_before_is_found_and_gives_the_same_tokens(
    api: openai.OpenAI, served: ServedCluster
) -> None:
    def asked(salt: str) -> tuple[list[int], int]:
        answer = api.completions.create(
            model=RANDOM,
            prompt=prompt_of(50, 77),
            max_tokens=9,
            extra_body={**GREEDY, "return_token_ids": True, "cache_salt": salt},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached is not None
        return answer.choices[0].to_dict()["token_ids"], cached  # type: ignore[return-value]

    tokens, cached = asked("first")
    assert cached == 0
    assert asked("first") == (tokens, 48)
    assert asked("second") == (tokens, 0)


def test_token_ids_in_and_token_ids_out(api: openai.OpenAI, served: ServedCluster) -> None:
    prompt = prompt_of(11, 4)
    answer = api.completions.create(
        model=RANDOM, prompt=prompt, max_tokens=9, extra_body={**GREEDY, "return_token_ids": True}
    )
    choice = answer.choices[0].to_dict()
    assert choice["prompt_token_ids"] == prompt
    assert tuple(choice["token_ids"]) == served.expected(prompt, 9)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 9)


def test_a_list_of_prompts_is_answered_in_order(api: openai.OpenAI, served: ServedCluster) -> None:
    prompts = [prompt_of(3, 5), prompt_of(12, 6), prompt_of(7, 7)]
    answer = api.completions.create(
        model=RANDOM, prompt=prompts, max_tokens=6, extra_body={**GREEDY, "return_token_ids": True}
    )
    got = [tuple(choice.to_dict()["token_ids"]) for choice in answer.choices]  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert got == [served.expected(prompt, 6) for prompt in prompts]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (22, 18)


def test_a_streamed_completion_is_the_whole_one(api: openai.OpenAI) -> None:
    whole = api.completions.create(
        model=TINY, prompt="In the beginning", max_tokens=20, extra_body=GREEDY
    )
    chunks = list(
        api.completions.create(
            model=TINY,
            prompt="In the beginning",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=GREEDY,
        )
    )
    assert len(chunks) > 5
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_a_chat_is_answered_whole_and_streamed(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(
        model=TINY,
        messages=HELLO,
        max_tokens=16,
        extra_body=GREEDY,  # type: ignore[arg-type]
    )
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    stream: Any = api.chat.completions.create(
        model=TINY,
        messages=HELLO,  # type: ignore[call-overload]
        max_tokens=16,
        stream=True,
        extra_body=GREEDY,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def test_logprobs_of_a_chat_and_a_completion(api: openai.OpenAI) -> None:
    text = api.completions.create(
        model=TINY, prompt="God", max_tokens=4, logprobs=3, extra_body=GREEDY
    )
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 4
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert chosen == max(top.values())  # greedy takes the likeliest
    chat = api.chat.completions.create(
        model=TINY,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        extra_body=GREEDY,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [len(token.top_logprobs) for token in content.content] == [2] * 4


def test_an_echo_has_transformers_log_probabilities(
    served: ServedCluster, api: openai.OpenAI
) -> None:
    prompts = [prompt_of(length, length) for length in (3, 40, 90)]
    answer = api.completions.create(
        model=RANDOM, prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        first, *found = choice.logprobs.token_logprobs[:-1]
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            rows = served.oracle(input_ids=ids).logits[0].float().log_softmax(-1)
        expected = rows[:-1].gather(1, ids[0, 1:, None]).squeeze(1).tolist()
        assert first is None
        assert found == pytest.approx(expected, abs=1e-3)


def test_two_choices_differ_and_a_seed_repeats_them(api: openai.OpenAI) -> None:
    first, again = (
        api.completions.create(model=TINY, prompt="And", max_tokens=12, n=2, seed=11, temperature=1)
        for _ in range(2)
    )
    assert [choice.index for choice in first.choices] == [0, 1]
    assert first.choices[0].text != first.choices[1].text
    assert [c.text for c in first.choices] == [c.text for c in again.choices]


def test_a_stop_string_ends_the_text_before_it(api: openai.OpenAI) -> None:
    plain = api.completions.create(model=TINY, prompt="And", max_tokens=24, extra_body=GREEDY)
    text = plain.choices[0].text
    stop = text[6:9]
    stopped = api.completions.create(
        model=TINY, prompt="And", max_tokens=24, stop=stop, extra_body=GREEDY
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.usage is not None
    assert plain.usage is not None
    assert stopped.usage.completion_tokens < plain.usage.completion_tokens


def test_server_sent_events_end_with_done(http: httpx.Client) -> None:
    body = {"model": TINY, "prompt": "In", "max_tokens": 5, "stream": True, **GREEDY}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "text_completion" for event in events[:-1])


def test_operators_see_life_readiness_and_metrics(
    http: httpx.Client, served: ServedCluster
) -> None:
    assert http.get("/health").status_code == 200
    ready, told = http.get("/ready").json(), served.status()
    assert (ready["ready"], ready["reason"]) == (True, None)
    assert (ready["epoch"], ready["placement_version"]) == (told.epoch, told.placement_version)
    assert 0 <= ready["controller_loop_age_s"] < 10

    def generated() -> float:
        samples = served.metric("expertmesh_generation_tokens_total").items()
        return sum(value for labels, value in samples if f'model_name="{TINY}"' in labels)

    before = generated()
    body = {"model": TINY, "prompt": "In", "max_tokens": 5, **GREEDY}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert generated() == before + 5
    assert served.running() == 0
    assert served.metric("expertmesh_missing_experts") == {"expertmesh_missing_experts": 0}
    assert len(served.metric("expertmesh_actor_experts")) == len(served.actors())


class Person(pydantic.BaseModel):
    """What an answer is parsed into."""

    age: int = pydantic.Field(ge=0, le=120)
    kind: Literal["king", "prophet"]


def test_openais_helper_parses_an_answer_of_a_form(api: openai.OpenAI) -> None:
    for seed in range(3):
        answer = api.chat.completions.parse(
            model=TINY,
            messages=HELLO,  # type: ignore[arg-type]
            response_format=Person,
            max_tokens=120,
            seed=seed,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Person)


def test_openais_helpers_read_tool_calls(api: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Person)]
    asked: dict[str, Any] = {
        "model": RANDOM, "messages": HELLO, "tools": tools, "tool_choice": "required",
        "parallel_tool_calls": False, "max_tokens": 200, "seed": 1,
    }  # fmt: skip
    [choice] = api.chat.completions.parse(**asked).choices
    [call] = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Person)
    with api.chat.completions.stream(**asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments]


def test_an_answer_fits_vllms_structured_outputs(api: openai.OpenAI) -> None:
    def text(form: dict[str, Any]) -> str:
        answer = api.completions.create(
            model=TINY,
            prompt="In the beginning",
            max_tokens=60,
            seed=1,
            extra_body={"structured_outputs": form},
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert re.fullmatch(r"\d{4}-\d\d", text({"regex": r"\d{4}-\d\d"}))
    assert text({"choice": ["heaven", "earth"]}) in ("heaven", "earth")
    assert re.fullmatch("ab{1,9}c", text({"grammar": 'root ::= "a" "b"{1,9} "c"'}))
    digits = {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 5}
    options = {"disable_any_whitespace": True}
    assert set(json.loads(text({"json": digits, **options}))) <= {1, 2, 3}


def test_a_text_is_tokenised_as_its_request_counts_it(
    api: openai.OpenAI, http: httpx.Client
) -> None:
    text = "In the beginning God created the heaven"
    answer = api.completions.create(model=TINY, prompt=text, max_tokens=1)
    found = http.post("/tokenize", json={"model": TINY, "prompt": text}).json()
    assert answer.usage is not None
    assert found["count"] == answer.usage.prompt_tokens
    back = http.post("/detokenize", json={"model": TINY, "tokens": found["tokens"]}).json()
    assert text in back["prompt"]
