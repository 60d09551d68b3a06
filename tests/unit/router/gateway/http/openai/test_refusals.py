"""What the OpenAI surface refuses, and how it tells of what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import OverloadedError, UnavailableError
from router.config.deployment import GatewayConfig
from router.messages.request import GenerationRequest, TokenEvent
from tests.unit.gateway_fakes import FakeUpstream, says, tokenizer
from tests.unit.http_calls import CHAT, COMPLETIONS, HELLO, call, completion, events, refusal


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'"x"', b"null", b"[" * 100_000, b"1" * 5000]
)
def test_bodies_that_are_no_json_object(path: str, body: bytes) -> None:
    upstream = FakeUpstream(says("x"))
    assert "body" in refusal(call(upstream, path, body), 400, None)
    assert upstream.requests == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_has_a_limit(declared: bool) -> None:
    limits = GatewayConfig(max_body_bytes=1024)
    for size, status in ((1024, 200), (1025, 413)):
        upstream = FakeUpstream(says("x"))
        body = b'{"model": "tiny", "prompt": "in"}'.ljust(size)
        headers = None if declared else {"content-length": "", "transfer-encoding": "chunked"}
        response = call(upstream, COMPLETIONS, body, headers, limits)
        assert response.status_code == status
        assert len(upstream.requests) == (status == 200)
        if status != 200:
            assert "limit of 1024 bytes" in refusal(response, status, None)
            assert "retry-after" not in response.headers


def test_requests_beyond_the_bound_are_refused_with_a_hint() -> None:
    prompts = ["in"] * 3
    for bound, status in ((3, 200), (2, 429)):
        limits = GatewayConfig(max_ongoing_requests=bound)
        body = {"model": "tiny", "prompt": prompts, "stream": False}
        response = call(FakeUpstream(says("beginning")), COMPLETIONS, body, limits=limits)
        assert response.status_code == status
    assert "at most 2 requests" in refusal(response, 429, None)
    assert response.headers["retry-after"] == "1"


def test_what_a_call_takes_of_memory_has_a_limit() -> None:
    ids = len(tokenizer().encode("in"))
    body = {"model": "tiny", "prompt": ["in"] * 5, "n": 4, "max_tokens": 8, "logprobs": 2}
    needed = 5 * 4 * (ids + 8 * 3)
    for bound, status in ((needed, 200), (needed - 1, 400)):
        limits = GatewayConfig(max_request_tokens=bound)
        upstream = FakeUpstream(says("x"))
        response = call(upstream, COMPLETIONS, body, limits=limits)
        assert response.status_code == status
        assert len(upstream.requests) == (5 if status == 200 else 0)
    assert f"add up to {needed} tokens" in refusal(response, 400, "prompt")


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        (COMPLETIONS, {"model": None}, "model"),
        (COMPLETIONS, {"best": 1}, "best"),
        (COMPLETIONS, {"messages": HELLO}, "messages"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"echo": "yes"}, "echo"),
        (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": True}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": False, "echo": True}, "max_tokens"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"logit_bias": {"five": 1}}, "logit_bias"),
        (COMPLETIONS, {"presence_penalty": 2.5}, "presence_penalty"),
        (COMPLETIONS, {"frequency_penalty": -2.5}, "frequency_penalty"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["in", ""]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["in", 5]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[5], [5, -1]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": {}}, "prompt"),
        (COMPLETIONS, {"temperature": float("nan")}, "temperature"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"stream": 1}, "stream"),
        (COMPLETIONS, {"stream_options": {}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": 1}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (
            COMPLETIONS,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
        ),
        (
            COMPLETIONS,
            {"stream": True, "stream_options": {"include_obfuscation": 1}},
            "stream_options.include_obfuscation",
        ),
        (COMPLETIONS, {"": 1}, "''"),
        (COMPLETIONS, {"return_token_ids": "yes"}, "return_token_ids"),
        (COMPLETIONS, {"timeout_s": 0}, "timeout_s"),
        (COMPLETIONS, {"on_expert_loss": "guess"}, "on_expert_loss"),
        (COMPLETIONS, {"priority": 0.5}, "priority"),
        (CHAT, {"priority": "high"}, "priority"),
        (CHAT, {"cache_salt": ""}, "cache_salt"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "x": 1}},
            "response_format.x",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x", "user": 1}]}, "messages[0].user"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": ["hi"]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": {}}]}, "messages[0].name"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]},
            "messages[0].tool_calls",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (CHAT, {"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        (CHAT, {"model": "bare"}, "messages"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": 2, "max_tokens": 2}, "max_completion_tokens"),
    ],
)
def test_bad_requests_name_their_field(path: str, extra: dict[str, Any], param: str) -> None:
    upstream = FakeUpstream(says("x"))
    base: dict[str, Any] = {"model": "tiny"}
    base |= {"prompt": "in"} if path == COMPLETIONS else {"messages": HELLO}
    refusal(call(upstream, path, {**base, **extra}), 400, param)
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"prompt": [5, "my secret"]}),
        (COMPLETIONS, {"prompt": [[5, "my secret"]]}),
        (COMPLETIONS, {"prompt": ["my secret " * 100]}),
        (COMPLETIONS, {"prompt": {"my secret": 1}}),
        (CHAT, {"messages": "my secret"}),
        (CHAT, {"messages": ["my secret"]}),
        (CHAT, {"messages": [{"role": "user", "content": ["my secret"]}]}),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "my secret"}, 1]}]},
        ),
        (CHAT, {"messages": [{"role": "user", "content": {"my secret": 1}}]}),
    ],
)
def test_refusals_do_not_repeat_the_prompt(path: str, extra: dict[str, Any]) -> None:
    response = call(FakeUpstream(says("x")), path, {"model": "tiny", **extra})
    assert response.status_code == 400
    assert "secret" not in response.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_harmless_values_of_unsupported_fields_pass(path: str) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "user": "ann",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "stop": None,
        "max_tokens": None,
    }
    if path == COMPLETIONS:
        body |= {"prompt": "in", "best_of": 1, "echo": False, "suffix": None}
    else:
        body |= {"messages": HELLO, "tools": [], "tool_choice": "none"}
        body |= {"response_format": {"type": "text"}}
    assert call(FakeUpstream(says("x")), path, body).status_code == 200


def test_unknown_models_and_paths() -> None:
    upstream = FakeUpstream(says("x"))
    missing = refusal(completion(upstream, model="nope"), 404, "model")
    assert "tiny" in missing
    assert completion(upstream, model="nope").json()["error"]["code"] == "model_not_found"
    refusal(call(upstream, "/v1/models/nope"), 404, "model")
    refusal(call(upstream, "/v1/nothing"), 404, None)
    refusal(call(upstream, COMPLETIONS), 405, None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(stream: bool) -> None:
    upstream = FakeUpstream(lambda request: [OverloadedError("full", retry_after_s=3)])
    response = completion(upstream, stream=stream)
    assert refusal(response, 429, None) == "full"
    assert response.headers["retry-after"] == "3"


def test_an_error_midway_is_an_event() -> None:
    def script(request: GenerationRequest) -> list[TokenEvent | Exception]:
        return [TokenEvent(0, tuple(tokenizer().encode(" was"))), UnavailableError("gone")]

    chunks = events(completion(FakeUpstream(script), stream=True))
    assert chunks[0]["choices"][0]["text"] == " was"
    assert chunks[-1]["error"]["message"] == "gone"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_ours_is_a_500_that_tells_nothing(stream: bool) -> None:
    upstream = FakeUpstream(lambda request: [ValueError("/secret 77")])
    response = completion(upstream, stream=stream)
    assert "secret" not in refusal(response, 500, None)
    assert response.headers["x-request-id"]


def test_what_is_not_ours_midway_tells_nothing() -> None:
    def script(request: GenerationRequest) -> list[TokenEvent | Exception]:
        return [TokenEvent(0, tuple(tokenizer().encode(" was"))), ValueError("/secret 77")]

    response = completion(FakeUpstream(script), stream=True)
    assert events(response)[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_tokens_that_end_too_early_are_an_error() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None))
    assert "ended before" in refusal(completion(upstream), 500, None)


def test_a_silent_upstream_is_given_up_at_the_deadline() -> None:
    upstream = FakeUpstream(lambda request: [], endless=True)
    refusal(completion(upstream, timeout_s=0.05), 504, None)
    assert upstream.closed.is_set()
