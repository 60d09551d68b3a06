"""What the OpenAI surface refuses, and how it tells of what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import OverloadedError, UnavailableError
from router.config.deployment import GatewayConfig
from router.messages.request import GenerationRequest, TokenEvent
from tests.unit.gateway_fakes import FakeUpstream, says, tokenizer
from tests.unit.http_calls import CHAT, COMPLETIONS, HELLO, call, completion, events, refusal

GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": "in"},
    CHAT: {"model": "tiny", "messages": HELLO},
}


@pytest.mark.parametrize("path", GOOD)
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
    assert "limit of 1024 bytes" in refusal(response, 413, None)
    assert "retry-after" not in response.headers


def test_requests_beyond_the_bound_are_refused_with_a_hint() -> None:
    for bound, status in ((3, 200), (2, 429)):
        limits = GatewayConfig(max_ongoing_requests=bound)
        body = {"model": "tiny", "prompt": ["in"] * 3}
        response = call(FakeUpstream(says("beginning")), COMPLETIONS, body, limits=limits)
        assert response.status_code == status
    assert "at most 2 concurrent requests" in refusal(response, 429, None)
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


TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA_FORM = {"type": "json_schema", "json_schema": {"schema": {}}, "x": 1}
BAD: dict[str, list[tuple[str, dict[str, Any]]]] = {
    COMPLETIONS: [
        ("model", {"model": None}),
        ("best", {"best": 1}),
        ("messages", {"messages": HELLO}),
        ("prompt_logprobs", {"prompt_logprobs": 0, "stream": True}),
        ("max_tokens", {"max_tokens": 0, "logprobs": 1}),
        ("max_tokens", {"max_tokens": -1, "echo": True}),
        ("max_tokens", {"max_tokens": False, "echo": True}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 2}),
        ("logit_bias", {"logit_bias": {"five": 1}}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": {}}),
        ("prompt", {"prompt": ["x"] * 129}),
        ("prompt[1]", {"prompt": ["in", ""]}),
        ("prompt[1]", {"prompt": ["in", 5]}),
        ("prompt[1][1]", {"prompt": [[5], [5, -1]]}),
        ("stream", {"stream": 1}),
        ("stream_options", {"stream_options": {}}),
        ("stream_options", {"stream": True, "stream_options": 1}),
        *(
            (f"stream_options.{name}", {"stream": True, "stream_options": {name: 1}})
            for name in ("x", "include_usage", "include_obfuscation")
        ),
    ],
    CHAT: [
        ("priority", {"priority": "high"}),
        ("prompt", {"prompt": "x"}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 2}),
        ("tools", {"tools": [TOOL]}),
        ("response_format.x", {"response_format": SCHEMA_FORM}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [*HELLO, {"role": "system", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x" * 100_000}]}),
        ("messages", {"model": "bare"}),
        *(
            (f"messages[0]{place}", {"messages": [message]})
            for place, message in (
                ("", "hi"),
                (".user", {"role": "user", "content": "x", "user": 1}),
                (".content", {"role": "user"}),
                (".role", {"role": ["user"], "content": "x"}),
                (".name", {"role": "user", "content": "x", "name": {}}),
                (".tool_calls", {"role": "assistant", "content": "x", "tool_calls": []}),
                (".content[0].type", {"role": "user", "content": [{"type": "image_url"}]}),
            )
        ),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("max_completion_tokens", {"max_completion_tokens": 2, "max_tokens": 2}),
    ],
}


@pytest.mark.parametrize(
    ("path", "param", "extra"), [(path, *case) for path, cases in BAD.items() for case in cases]
)
def test_bad_requests_name_their_field(path: str, param: str, extra: dict[str, Any]) -> None:
    upstream = FakeUpstream(says("x"))
    refusal(call(upstream, path, {**GOOD[path], **extra}), 400, param)
    assert upstream.requests == []


SECRET = "my secret"


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"prompt": [5, SECRET]}),
        (COMPLETIONS, {"prompt": [[5, SECRET]]}),
        (COMPLETIONS, {"prompt": [SECRET * 100]}),
        (COMPLETIONS, {"prompt": {SECRET: 1}}),
        (CHAT, {"messages": SECRET}),
        (CHAT, {"messages": [SECRET]}),
        (CHAT, {"messages": [{"role": "user", "content": [SECRET]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": SECRET}, 1]}]}),
        (CHAT, {"messages": [{"role": "user", "content": {SECRET: 1}}]}),
    ],
)
def test_refusals_do_not_repeat_the_prompt(path: str, extra: dict[str, Any]) -> None:
    response = call(FakeUpstream(says("x")), path, {"model": "tiny", **extra})
    assert response.status_code == 400
    assert "secret" not in response.text


def test_unknown_models_and_paths() -> None:
    upstream = FakeUpstream(says("x"))
    missing = completion(upstream, model="nope")
    assert "tiny" in refusal(missing, 404, "model")
    assert missing.json()["error"]["code"] == "model_not_found"
    refusal(call(upstream, "/v1/models/nope"), 404, "model")
    refusal(call(upstream, "/v1/nothing"), 404, None)
    refusal(call(upstream, COMPLETIONS), 405, None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status_without_secrets(stream: bool) -> None:
    upstream = FakeUpstream(lambda request: [OverloadedError("full", retry_after_s=3)])
    response = completion(upstream, stream=stream)
    assert refusal(response, 429, None) == "full"
    assert response.headers["retry-after"] == "3"
    upstream = FakeUpstream(lambda request: [ValueError("/secret 77")])
    response = completion(upstream, stream=stream)
    assert "secret" not in refusal(response, 500, None)
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "told"), [(UnavailableError("gone"), "gone"), (ValueError("/secret 77"), "")]
)
def test_an_error_midway_is_an_event(error: Exception, told: str) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent | Exception]:
        return [TokenEvent(0, tuple(tokenizer().encode(" was"))), error]

    response = completion(FakeUpstream(script), stream=True)
    chunks = events(response)
    assert chunks[0]["choices"][0]["text"] == " was"
    assert told in chunks[-1]["error"]["message"]
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_tokens_that_end_too_early_are_an_error() -> None:
    upstream = FakeUpstream(says(" was", finish_reason=None))
    assert "ended before" in refusal(completion(upstream), 500, None)


def test_a_silent_upstream_is_given_up_at_the_deadline() -> None:
    upstream = FakeUpstream(lambda request: [], endless=True)
    refusal(completion(upstream, timeout_s=0.05), 504, None)
    assert upstream.closed.is_set()
