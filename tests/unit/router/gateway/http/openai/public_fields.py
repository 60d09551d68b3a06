"""Requests in the form of public examples: for each field of OpenAI and vLLM what it does here.

The names are those of the request schemas: OpenAI's of its Python package 3.57.0, vLLM's of its
``protocol.py`` (its repository at 002032ee, the tokenizer's at 030ea52e), and those that
vLLM took until 0.12.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.unit.http_calls import CHAT, COMPLETIONS

PROMPT = "the quick brown fox"
HELLO = [{"role": "user", "content": PROMPT}]
TOKENS = 8
EOS = 0
FORCED = 70
"""A token that a bias brings at every place."""
OPENAI = "OpenAI, API reference"
OPENAI_FORMS = "OpenAI, guide Structured Outputs"
VLLM = "vLLM, OpenAI-Compatible Server"
VLLM_FORMS = "vLLM, Structured Outputs"
VLLM_SAMPLING = "vLLM, Sampling Parameters"
VLLM_OLD = "vLLM 0.11, OpenAI-Compatible Server"
CAR = {
    "type": "object",
    "properties": {
        "brand": {"type": "string", "maxLength": 6},
        "car_type": {"enum": ["sedan", "SUV", "Truck", "Coupe"]},
    },
    "required": ["brand", "car_type"],
    "additionalProperties": False,
}
SQL = """
    ?start: select_statement
    ?select_statement: "SELECT " column_list " FROM " table_name
    ?column_list: column_name ("," column_name)?
    ?table_name: identifier
    ?column_name: identifier
    ?identifier: /[a-z]{1,4}/
"""
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
SQL_GBNF = """
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
"""
Answer = dict[str, Any]
Shown = Callable[[Answer, Answer], bool]
"""Whether an answer shows the wish; beside it the answer without the field."""


@dataclass(frozen=True)
class Case:
    """A field of an endpoint, where an example is, and the body's fields in its form.

    Without ``shows`` it is enough that the request passes. A refused one names the field.
    """

    path: str
    field: str
    source: str
    body: Mapping[str, Any] = field(hash=False)
    shows: Shown | None = None
    is_refused: bool = False

    def __str__(self) -> str:
        value = json.dumps(self.body.get(self.field, self.body))
        return f"{self.path.rpartition('/')[2]} {self.field}={value[:40]}"


def texts(answer: Answer) -> list[str]:
    """Return the text of each choice."""
    return [
        choice["text"] if "text" in choice else choice["message"]["content"]
        for choice in answer["choices"]
    ]


def count(answer: Answer) -> int:
    return int(answer["usage"]["completion_tokens"])


def same(answer: Answer, plain: Answer) -> bool:
    return texts(answer) == texts(plain)


def differs(answer: Answer, plain: Answer) -> bool:
    return texts(answer) != texts(plain)


def is_car(answer: Answer, plain: Answer) -> bool:
    return json.loads(texts(answer)[0])["car_type"] in CAR["properties"]["car_type"]["enum"]


def has(*names: str) -> Shown:
    """Return whether the first choice, or the answer, has fields that are not null."""
    return lambda answer, plain: all(
        (answer | answer["choices"][0]).get(name) is not None for name in names
    )


def of_length(number: int) -> Shown:
    return lambda answer, plain: count(answer) == number


def both(name: str, source: str, body: Mapping[str, Any], shows: Shown | None = None) -> list[Case]:
    """Return the case for completions and for chats."""
    return [Case(path, name, source, body, shows) for path in (COMPLETIONS, CHAT)]


def passing(source: str, paths: Sequence[str], **fields: Any) -> list[Case]:
    """Return a case for each field, whose value changes nothing: the answer is the same."""
    return [
        Case(path, name, source, {name: value}, same)
        for path in paths
        for name, value in fields.items()
    ]


def refused(source: str, paths: Sequence[str], **fields: Any) -> list[Case]:
    """Return a case for each field, whose value is refused by the field's name."""
    return [
        Case(path, name, source, {name: value}, is_refused=True)
        for path in paths
        for name, value in fields.items()
    ]


EVERY = (COMPLETIONS, CHAT)
LONG = {"max_tokens": 60}
SCHEMA_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "car", "schema": CAR, "strict": True},
}
_ONLY_FORCED = {"logit_bias": {str(FORCED): 100}}
_ONLY_EOS = {"logit_bias": {str(EOS): 100}}

_OF_OPENAI = [
    *both("model", OPENAI, {}, lambda answer, plain: answer["model"] == "m"),
    *both("max_tokens", OPENAI, {"max_tokens": 3}, of_length(3)),
    Case(CHAT, "max_completion_tokens", OPENAI, {"max_completion_tokens": 3, "max_tokens": None},
         of_length(3)),
    *both("temperature", OPENAI, {"temperature": 1.5, "seed": 7}, differs),
    *both("top_p", OPENAI, {"top_p": 0.0001, "temperature": 1}, same),
    *both("n", OPENAI, {"n": 2}, lambda answer, plain: len(answer["choices"]) == 2),
    *both("seed", OPENAI, {"seed": 7, "temperature": 2}, differs),
    *both("stop", OPENAI, {"stop": "\n"}, lambda answer, plain: "\n" not in texts(answer)[0]),
    *both("stop", OPENAI, {"stop": ["\n", "END"]}),
    *both("frequency_penalty", OPENAI, {"frequency_penalty": 1.5, **_ONLY_FORCED}, differs),
    *both("presence_penalty", OPENAI, {"presence_penalty": 1.5, **_ONLY_FORCED}, differs),
    *both("logit_bias", OPENAI, {"logit_bias": {str(FORCED): 100, "50": -100},
                                 "return_token_ids": True},
          lambda answer, plain: answer["choices"][0]["token_ids"] == [FORCED] * TOKENS),
    *both("stream", OPENAI, {"stream": True}, has("events")),
    *both("stream_options", OPENAI, {"stream": True, "stream_options": {"include_usage": True}},
          lambda answer, plain: answer["events"][-1]["usage"]["completion_tokens"] == TOKENS),
    Case(COMPLETIONS, "prompt", OPENAI, {"prompt": "Say this is a test"}, differs),
    Case(COMPLETIONS, "prompt", OPENAI, {"prompt": ["Say this", "is a test"]},
         lambda answer, plain: len(answer["choices"]) == 2),
    Case(COMPLETIONS, "prompt", OPENAI, {"prompt": [[40, 41], [42]]},
         lambda answer, plain: answer["usage"]["prompt_tokens"] == 3),
    Case(COMPLETIONS, "logprobs", OPENAI, {"logprobs": 2},
         lambda answer, plain: len(answer["choices"][0]["logprobs"]["tokens"]) == TOKENS),
    Case(COMPLETIONS, "echo", OPENAI, {"echo": True},
         lambda answer, plain: texts(answer)[0] == PROMPT + texts(plain)[0]),
    *passing(OPENAI, [COMPLETIONS], best_of=1, suffix=""),
    *refused(OPENAI, [COMPLETIONS], best_of=3, suffix="the end"),
    Case(CHAT, "messages", OPENAI, {"messages": [
        {"role": "developer", "content": "You are a helpful assistant."}, *HELLO]}, differs),
    Case(CHAT, "messages", OPENAI, {"messages": [
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]}, same),
    *refused(OPENAI, [CHAT], messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}]}]),
    Case(CHAT, "logprobs", OPENAI, {"logprobs": True},
         lambda answer, plain: len(answer["choices"][0]["logprobs"]["content"]) == TOKENS),
    Case(CHAT, "top_logprobs", OPENAI, {"logprobs": True, "top_logprobs": 2},
         lambda answer, plain: len(
             answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2),
    Case(CHAT, "response_format", OPENAI_FORMS, {"response_format": SCHEMA_FORMAT, **LONG}, is_car),
    *both("response_format", OPENAI, {"response_format": {"type": "text"}}, same),
    *refused(OPENAI, EVERY, response_format={"type": "xml"}),
    *passing(OPENAI, EVERY, user="user-123", metadata={"topic": "demo"}, store=False,
             service_tier="auto", safety_identifier="b1c2", prompt_cache_key="docs",
             prompt_cache_retention="24h", prompt_cache_options={"ttl": "30m"}),
    *refused(OPENAI, EVERY, store=True, service_tier="flex", moderation={"model": "omni"}),
    Case(CHAT, "tools", OPENAI, {"tools": [TOOL]}),
    Case(CHAT, "tool_choice", OPENAI, {"tools": [TOOL], "tool_choice": "none"}, same),
    *passing(OPENAI, [CHAT], modalities=["text"], tools=[], tool_choice="none",
             parallel_tool_calls=True, functions=[], function_call="none"),
    *refused(OPENAI, [CHAT], modalities=["text", "audio"],
             audio={"voice": "alloy", "format": "wav"},
             prediction={"type": "content", "content": "x"}, reasoning_effort="low",
             verbosity="low", web_search_options={}, tool_choice="required",
             functions=[TOOL["function"]], function_call={"name": "get_weather"}),
]  # fmt: skip
_OF_VLLM = [
    *both("top_k", VLLM_SAMPLING, {"top_k": 1, "temperature": 1}, same),
    *both("min_p", VLLM_SAMPLING, {"min_p": 1, "temperature": 1}, same),
    *both("repetition_penalty", VLLM_SAMPLING, {"repetition_penalty": 2.0}),
    *both("stop_token_ids", VLLM_SAMPLING, {"stop_token_ids": [FORCED], **_ONLY_FORCED},
          of_length(1)),
    *both("ignore_eos", VLLM_SAMPLING, {"ignore_eos": True, **_ONLY_EOS}, of_length(TOKENS)),
    *both("ignore_eos", VLLM_SAMPLING, {"ignore_eos": False, **_ONLY_EOS}, of_length(1)),
    *both("min_tokens", VLLM_SAMPLING, {"min_tokens": 4, **_ONLY_EOS}, of_length(5)),
    *both("bad_words", VLLM_SAMPLING, {"bad_words": ["the", "fox"]},
          lambda answer, plain: "fox" not in texts(answer)[0]),
    *both("structured_outputs", VLLM_FORMS,
          {"structured_outputs": {"choice": ["positive", "negative"]}, **LONG},
          lambda answer, plain: texts(answer)[0] in ("positive", "negative")),
    *both("structured_outputs", VLLM_FORMS,
          {"structured_outputs": {"regex": r"[a-z]{2,5}@[a-z]{2,5}\.com\n"}, "stop": ["\n"],
           **LONG},
          lambda answer, plain: texts(answer)[0].endswith(".com")),
    *both("structured_outputs", VLLM_FORMS, {"structured_outputs": {"json": CAR}, **LONG}, is_car),
    *both("structured_outputs", VLLM_FORMS, {"structured_outputs": {"grammar": SQL}, **LONG},
          lambda answer, plain: texts(answer)[0].startswith("SELECT ")),
    *both("structured_outputs", VLLM_FORMS, {"structured_outputs": {"grammar": SQL_GBNF}, **LONG},
          lambda answer, plain: " from table_" in texts(answer)[0]),
    *refused(VLLM_FORMS, EVERY, structured_outputs={"structural_tag": "{}"}),
    Case(COMPLETIONS, "response_format", VLLM, {"response_format": SCHEMA_FORMAT, **LONG}, is_car),
    *both("return_token_ids", VLLM, {"return_token_ids": True},
          has("token_ids", "prompt_token_ids")),
    *passing(VLLM, EVERY, priority=3, cache_salt="bWluZQ"),
    Case(COMPLETIONS, "prompt_logprobs", VLLM, {"prompt_logprobs": 1}, has("prompt_logprobs")),
    *refused(VLLM, [CHAT], prompt_logprobs=1),
    # The defaults pass, and all else is refused, so that no wish is dropped.
    *passing(VLLM_SAMPLING, EVERY, use_beam_search=False, length_penalty=1.0, watermarking=False,
             include_stop_str_in_output=False, skip_special_tokens=True,
             spaces_between_special_tokens=True, truncation_side="left"),
    *refused(VLLM_SAMPLING, EVERY, use_beam_search=True, length_penalty=0.8, watermarking=True,
             include_stop_str_in_output=True, skip_special_tokens=False,
             spaces_between_special_tokens=False, truncation_side="middle",
             truncate_prompt_tokens=100, allowed_token_ids=[5, 6], logprob_token_ids=[5]),
    *passing(VLLM, EVERY, session_id="conversation-1", return_tokens_as_token_ids=False,
             return_token_offsets=True, return_mm_kwargs=True, vllm_xargs={}, stream_interval=1),
    *refused(VLLM, EVERY, request_id="cmpl-1", return_tokens_as_token_ids=True,
             kv_transfer_params={"do_remote_decode": True}, ec_transfer_params={"a": 1},
             vllm_xargs={"a": 1}, stream_interval=20, thinking_token_budget=100,
             repetition_detection={"max_pattern_size": 4}, routed_experts_prompt_start=1),
    *passing(VLLM, [COMPLETIONS], add_special_tokens=True),
    *refused(VLLM, [COMPLETIONS], add_special_tokens=False, prompt_embeds="AAAA"),
    *passing(VLLM, [CHAT], echo=False, add_generation_prompt=True, continue_final_message=False,
             add_special_tokens=False, documents=[], media_io_kwargs={}, mm_processor_kwargs={},
             return_prompt_text=False),
    *refused(VLLM, [CHAT], echo=True, add_generation_prompt=False, continue_final_message=True,
             add_special_tokens=True, documents=[{"title": "a", "text": "b"}],
             media_io_kwargs={"video": {"num_frames": 40}}, mm_processor_kwargs={"num_crops": 4},
             return_prompt_text=True, chat_template="{{ messages }}", include_reasoning=False,
             chat_template_kwargs={"enable_thinking": False}),
    *refused(VLLM_OLD, EVERY, guided_json=CAR, guided_regex="[0-9]+", guided_choice=["a", "b"],
             guided_grammar=SQL, guided_decoding_backend="xgrammar",
             guided_whitespace_pattern=" ", structural_tag="{}"),
    *refused(VLLM_OLD, [CHAT], best_of=1),
]  # fmt: skip
CASES = [*_OF_OPENAI, *_OF_VLLM]

_VLLM_BOTH = (
    "model", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_p",
    "user", "use_beam_search", "top_k", "min_p", "repetition_penalty", "watermarking",
    "length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens",
    "truncation_side", "allowed_token_ids", "prompt_logprobs", "logprob_token_ids", "bad_words",
    "add_special_tokens", "response_format", "structured_outputs", "priority", "request_id",
    "session_id", "return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start",
    "return_token_offsets", "return_mm_kwargs", "cache_salt", "kv_transfer_params",
    "ec_transfer_params", "vllm_xargs", "repetition_detection", "thinking_token_budget",
    "stream_interval",
)  # fmt: skip
_UNTIL_0_12 = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
    "guided_whitespace_pattern", "structural_tag", "best_of",
)  # fmt: skip
PUBLIC: Mapping[str, frozenset[str]] = {
    COMPLETIONS: frozenset({"prompt", "suffix", "prompt_embeds", *_VLLM_BOTH, *_UNTIL_0_12}),
    CHAT: frozenset(
        {
            "messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
            "reasoning_effort", "include_reasoning", "parallel_tool_calls",
            "add_generation_prompt", "continue_final_message", "documents", "chat_template",
            "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs",
            "return_prompt_text", *_VLLM_BOTH, *_UNTIL_0_12,
        }
    ),
}  # fmt: skip
"""vLLM's fields of each endpoint; OpenAI's are read off its package."""
