"""Each field of OpenAI's and vLLM's requests passes, and shows, or is refused by its name.

The examples have the form of OpenAI's API reference and its guide Structured Outputs, of vLLM's
OpenAI-Compatible Server, Structured Outputs and Sampling Parameters, and of what vLLM took until
0.12. vLLM's names are those of its ``protocol.py`` (its repository at 002032ee).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats

from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.local_cluster import MODEL, LocalCluster
from tests.local_gateway import LocalGateway, grammars_of
from tests.unit.http_calls import CHAT, COMPLETIONS, events

PROMPT = "the quick brown fox"
HELLO = [{"role": "user", "content": PROMPT}]
TOKENS = 8
EOS = 0
FORCED = 70
"""A token that a bias brings at every place."""
PLAIN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0},
    CHAT: {"messages": HELLO, "max_tokens": TOKENS, "temperature": 0},
}
CAR = {
    "type": "object",
    "properties": {
        "brand": {"type": "string", "maxLength": 6},
        "car_type": {"enum": ["sedan", "SUV", "Truck", "Coupe"]},
    },
    "required": ["brand", "car_type"],
    "additionalProperties": False,
}
CAR_FORMAT = {"type": "json_schema", "json_schema": {"name": "car", "schema": CAR, "strict": True}}
SQL = """
    ?start: select_statement
    ?select_statement: "SELECT " column_list " FROM " table_name
    ?column_list: column_name ("," column_name)?
    ?table_name: identifier
    ?column_name: identifier
    ?identifier: /[a-z]{1,4}/
"""
SQL_GBNF = """
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
"""
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}
Answer = dict[str, Any]
Shown = Callable[[Answer, Answer], bool]
"""Whether an answer shows the wish; beside it the answer without the field."""


@dataclass(frozen=True)
class Case:
    """A body, whose first field is the example.

    Without ``shows`` it is enough that the request passes. A refused one names the field.
    """

    path: str
    body: Mapping[str, Any] = field(hash=False)
    shows: Shown | None = None
    is_refused: bool = False

    @property
    def name(self) -> str:
        return next(iter(self.body))

    def __str__(self) -> str:
        value = json.dumps(self.body[self.name])
        return f"{self.path.rpartition('/')[2]} {self.name}={value[:40]}"


def text_of(answer: Answer) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def same(answer: Answer, plain: Answer) -> bool:
    return text_of(answer) == text_of(plain)


def differs(answer: Answer, plain: Answer) -> bool:
    return not same(answer, plain)


def is_car(answer: Answer, plain: Answer) -> bool:
    return json.loads(text_of(answer))["car_type"] in ("sedan", "SUV", "Truck", "Coupe")


def has(*names: str) -> Shown:
    """Return whether the first choice, or the answer, has fields that are not null."""
    return lambda answer, plain: all(
        (answer | answer["choices"][0]).get(name) is not None for name in names
    )


def of_length(number: int) -> Shown:
    return lambda answer, plain: answer["usage"]["completion_tokens"] == number


def of_choices(number: int) -> Shown:
    return lambda answer, plain: len(answer["choices"]) == number


def text_has(test: Callable[[str], bool]) -> Shown:
    return lambda answer, plain: test(text_of(answer))


def of_text(shows: Shown | None = None, **body: Any) -> list[Case]:
    return [Case(COMPLETIONS, body, shows)]


def of_chat(shows: Shown | None = None, **body: Any) -> list[Case]:
    return [Case(CHAT, body, shows)]


def both(shows: Shown | None = None, **body: Any) -> list[Case]:
    return of_text(shows, **body) + of_chat(shows, **body)


def passing(*paths: str, **fields: Any) -> list[Case]:
    """Return a case for each field, whose value changes nothing: the answer is the same."""
    return [Case(path, {name: value}, same) for path in paths for name, value in fields.items()]


def refused(*paths: str, **fields: Any) -> list[Case]:
    """Return a case for each field, whose value is refused by the field's name."""
    return [
        Case(path, {name: value}, is_refused=True)
        for path in paths
        for name, value in fields.items()
    ]


EVERY = (COMPLETIONS, CHAT)
BIASED: dict[str, Any] = {"logit_bias": {str(FORCED): 100}}
ENDING: dict[str, Any] = {"logit_bias": {str(EOS): 100}}
LONG: dict[str, Any] = {"max_tokens": 60}
CASES = [
    # OpenAI's
    *both(lambda answer, plain: answer["model"] == MODEL, model=MODEL),
    *both(of_length(3), max_tokens=3),
    *of_chat(of_length(3), max_completion_tokens=3, max_tokens=None),
    *both(differs, temperature=1.5, seed=7),
    *both(same, top_p=0.0001, temperature=1),
    *both(of_choices(2), n=2),
    *both(differs, seed=7, temperature=2),
    *both(text_has(lambda text: "\n" not in text), stop="\n"),
    *both(stop=["\n", "END"]),
    *both(differs, frequency_penalty=1.5, **BIASED),
    *both(differs, presence_penalty=1.5, **BIASED),
    *both(lambda answer, plain: answer["choices"][0]["token_ids"] == [FORCED] * TOKENS,
          logit_bias={str(FORCED): 100, "50": -100}, return_token_ids=True),
    *both(has("events"), stream=True),
    *both(lambda answer, plain: answer["events"][-1]["usage"]["completion_tokens"] == TOKENS,
          stream_options={"include_usage": True}, stream=True),
    *of_text(differs, prompt="Say this is a test"),
    *of_text(of_choices(2), prompt=["Say this", "is a test"]),
    *of_text(lambda answer, plain: answer["usage"]["prompt_tokens"] == 3, prompt=[[40, 41], [42]]),
    *of_text(lambda answer, plain: len(answer["choices"][0]["logprobs"]["tokens"]) == TOKENS,
             logprobs=2),
    *of_text(lambda answer, plain: text_of(answer) == PROMPT + text_of(plain), echo=True),
    *passing(COMPLETIONS, best_of=1, suffix=""),
    *refused(COMPLETIONS, best_of=3, suffix="the end"),
    *of_chat(differs, messages=[{"role": "developer", "content": "You are helpful."}, *HELLO]),
    *of_chat(same, messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]),
    *refused(CHAT, messages=[{"role": "user", "content": [IMAGE]}]),
    *of_chat(lambda answer, plain: len(answer["choices"][0]["logprobs"]["content"]) == TOKENS,
             logprobs=True),
    *of_chat(lambda answer, plain: len(
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2,
        top_logprobs=2, logprobs=True),
    *both(is_car, response_format=CAR_FORMAT, **LONG),
    *both(same, response_format={"type": "text"}),
    *refused(*EVERY, response_format={"type": "xml"}),
    *passing(*EVERY, user="user-123", metadata={"topic": "demo"}, store=False,
             service_tier="auto", safety_identifier="b1c2", prompt_cache_key="docs",
             prompt_cache_retention="24h", prompt_cache_options={"ttl": "30m"}),
    *refused(*EVERY, store=True, service_tier="flex", moderation={"model": "omni"}),
    *of_chat(tools=[TOOL]),
    *of_chat(same, tool_choice="none", tools=[TOOL]),
    *passing(CHAT, modalities=["text"], tools=[], tool_choice="none", parallel_tool_calls=True,
             functions=[], function_call="none"),
    *refused(CHAT, modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"},
             prediction={"type": "content", "content": "x"}, reasoning_effort="low",
             verbosity="low", web_search_options={}, tool_choice="required",
             functions=[TOOL["function"]], function_call={"name": "get_weather"}),
    # vLLM's
    *both(same, top_k=1, temperature=1),
    *both(same, min_p=1, temperature=1),
    *both(repetition_penalty=2.0),
    *both(of_length(1), stop_token_ids=[FORCED], **BIASED),
    *both(of_length(TOKENS), ignore_eos=True, **ENDING),
    *both(of_length(1), ignore_eos=False, **ENDING),
    *both(of_length(5), min_tokens=4, **ENDING),
    *both(text_has(lambda text: "fox" not in text), bad_words=["the", "fox"]),
    *both(text_has(lambda text: text in ("positive", "negative")),
          structured_outputs={"choice": ["positive", "negative"]}, **LONG),
    *both(text_has(lambda text: text.endswith(".com")),
          structured_outputs={"regex": r"[a-z]{2,5}@[a-z]{2,5}\.com\n"}, stop=["\n"], **LONG),
    *both(is_car, structured_outputs={"json": CAR}, **LONG),
    *both(text_has(lambda text: text.startswith("SELECT ")),
          structured_outputs={"grammar": SQL}, **LONG),
    *both(text_has(lambda text: " from table_" in text),
          structured_outputs={"grammar": SQL_GBNF}, **LONG),
    *refused(*EVERY, structured_outputs={"structural_tag": "{}"}),
    *both(has("token_ids", "prompt_token_ids"), return_token_ids=True),
    *passing(*EVERY, priority=3, cache_salt="bWluZQ"),
    *of_text(has("prompt_logprobs"), prompt_logprobs=1),
    *refused(CHAT, prompt_logprobs=1),
    # The defaults pass, and all else is refused, so that no wish is dropped.
    *passing(*EVERY, use_beam_search=False, length_penalty=1.0, watermarking=False,
             include_stop_str_in_output=False, skip_special_tokens=True,
             spaces_between_special_tokens=True, truncation_side="left"),
    *refused(*EVERY, use_beam_search=True, length_penalty=0.8, watermarking=True,
             include_stop_str_in_output=True, skip_special_tokens=False,
             spaces_between_special_tokens=False, truncation_side="middle",
             truncate_prompt_tokens=100, allowed_token_ids=[5, 6], logprob_token_ids=[5]),
    *passing(*EVERY, session_id="conversation-1", return_tokens_as_token_ids=False,
             return_token_offsets=True, return_mm_kwargs=True, vllm_xargs={}, stream_interval=1),
    *refused(*EVERY, request_id="cmpl-1", return_tokens_as_token_ids=True,
             kv_transfer_params={"do_remote_decode": True}, ec_transfer_params={"a": 1},
             vllm_xargs={"a": 1}, stream_interval=20, thinking_token_budget=100,
             repetition_detection={"max_pattern_size": 4}, routed_experts_prompt_start=1),
    *passing(COMPLETIONS, add_special_tokens=True),
    *refused(COMPLETIONS, add_special_tokens=False, prompt_embeds="AAAA"),
    *passing(CHAT, echo=False, add_generation_prompt=True, continue_final_message=False,
             add_special_tokens=False, documents=[], media_io_kwargs={}, mm_processor_kwargs={},
             return_prompt_text=False),
    *refused(CHAT, echo=True, add_generation_prompt=False, continue_final_message=True,
             add_special_tokens=True, documents=[{"title": "a", "text": "b"}],
             media_io_kwargs={"video": {"num_frames": 40}}, mm_processor_kwargs={"num_crops": 4},
             return_prompt_text=True, chat_template="{{ messages }}", include_reasoning=False,
             chat_template_kwargs={"enable_thinking": False}),
    # vLLM's until 0.12
    *refused(*EVERY, guided_json=CAR, guided_regex="[0-9]+", guided_choice=["a", "b"],
             guided_grammar=SQL, guided_decoding_backend="xgrammar",
             guided_whitespace_pattern=" ", structural_tag="{}"),
    *refused(CHAT, best_of=1),
]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGateway]:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder, num_hidden_layers=1)
    grammars = grammars_of(folder, VOCAB_SIZE, EOS)
    cluster = LocalCluster(folder, grammars=grammars)
    yield LocalGateway(folder, cluster)
    cluster.close()
    grammars.close()


def post(gateway: LocalGateway, path: str, body: Mapping[str, Any]) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": MODEL, **PLAIN[path], **body})

    return asyncio.run(send())


@pytest.fixture(scope="module")
def plain(gateway: LocalGateway) -> dict[str, dict[str, Any]]:
    """The answers without any field beside the required ones."""
    return {path: post(gateway, path, {}).json() for path in PLAIN}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_public_example(
    gateway: LocalGateway, plain: dict[str, dict[str, Any]], case: Case
) -> None:
    response = post(gateway, case.path, case.body)
    if case.is_refused:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        name, _, _ = error["param"].replace("[", ".").partition(".")
        assert name == case.name
        assert any(words in error["message"] for words in ("allowed", "only", "must be"))
        return
    assert response.status_code == 200, response.text
    is_stream = case.body.get("stream", False)
    answer = {"choices": [{}], "events": events(response)} if is_stream else response.json()
    if case.shows is not None:
        assert case.shows(answer, plain[case.path]), answer


def test_no_field_of_openais_package_is_left_out() -> None:
    for path, requests in ((COMPLETIONS, of_completions), (CHAT, of_chats)):
        found = {case.name for case in CASES if case.path == path}
        assert {*requests.CompletionCreateParamsBase.__annotations__, "stream"} <= found


def test_what_takes_the_place_of_fields_that_vllm_has_dropped_is_told(
    gateway: LocalGateway,
) -> None:
    error = post(gateway, COMPLETIONS, {"guided_regex": "[0-9]+"}).json()["error"]
    assert "give structured_outputs.regex" in error["message"]
    error = post(gateway, CHAT, {"guided_decoding_backend": "auto"}).json()["error"]
    assert "leave it out" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "best_of", True),
        (COMPLETIONS, "store", 0),
        (CHAT, "parallel_tool_calls", 1),
        (CHAT, "use_beam_search", 0),
    ],
)
def test_a_harmless_value_is_typed(
    gateway: LocalGateway, path: str, field: str, value: object
) -> None:
    response = post(gateway, path, {field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
