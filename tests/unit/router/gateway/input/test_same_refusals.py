"""HTTP and gRPC refuse the same in the same words, and known fields of OpenAI's one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from router.client import Client, Message, Sampling
from router.gateway.input.request.harmless import ANY
from router.gateway.input.request.model import ChatRequest, CompletionRequest, Request
from tests.unit import http_calls
from tests.unit.gateway_fakes import CONTEXT, FakeUpstream, grpc_server, says, vocab_size
from tests.unit.http_calls import HELLO, call, refusal

UPSTREAM = FakeUpstream(says("x"))
"""Never asked: all that is sent here is refused."""
PATHS: dict[str, type[Request]] = {
    http_calls.COMPLETIONS: CompletionRequest,
    http_calls.CHAT: ChatRequest,
}
GOOD: dict[str, dict[str, Any]] = {
    http_calls.COMPLETIONS: {"model": "tiny", "prompt": "in"},
    http_calls.CHAT: {"model": "tiny", "messages": HELLO},
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with grpc_server(UPSTREAM) as address, Client(address, retry=None) as connected:
        yield connected


BAD: list[tuple[str, Any]] = [
    *(("max_tokens", bad) for bad in (0, -1, -(2**31), 2**31, 2**63 - 1, CONTEXT + 1)),
    *(("temperature", bad) for bad in (math.nan, -1.0, -1e-9, math.inf, -math.inf, 100.5)),
    *(("top_p", bad) for bad in (0.0, -0.5, 1.0000001, math.nan, math.inf)),
    *(("min_p", bad) for bad in (-0.1, 1.1, math.nan)),
    *(("top_k", bad) for bad in (-2, 2**31)),
    *(("n", bad) for bad in (0, -1, 17, 2**31)),
    *(("logprobs", bad) for bad in (-1, 21, 2**31)),
    *(("prompt_logprobs", bad) for bad in (-1, 21, 2**31)),
    *(("frequency_penalty", bad) for bad in (-2.1, 2.1, math.nan)),
    *(("presence_penalty", bad) for bad in (-2.1, 2.1, math.inf)),
    *(("repetition_penalty", bad) for bad in (0.0, -1.0, 2.5, math.nan)),
    *(("min_tokens", bad) for bad in (-1, 17, 2**63 - 1)),
    *(("stop_token_ids", bad) for bad in ([-1], [vocab_size()], [5] * 129)),
    *(("bad_words", bad) for bad in ([""], [" "], ["a" * 257], ["a"] * 129)),
    ("stop", ["a"] * 17),
    ("stop", ["a", ""]),
    ("stop", ["a" * 257]),
]


@pytest.mark.parametrize(("field", "bad"), BAD)
def test_sampling_is_refused_alike(client: Client, field: str, bad: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("in", Sampling(**{field: bad}), model="tiny")
    told = caught.value
    assert told.field.startswith(f"sampling.{field}")
    where = told.field.removeprefix("sampling.")
    body = {**GOOD[http_calls.COMPLETIONS], field: bad}
    said = refusal(call(UPSTREAM, http_calls.COMPLETIONS, body), 400, where)
    assert said == f"{where}: {told.message}"


@pytest.mark.parametrize(
    ("bias", "field"),
    [
        ({-1: 1.0}, "logit_bias"),
        ({vocab_size(): 1.0}, "logit_bias"),
        ({5: 100.5}, "logit_bias.5"),
        ({5: math.nan}, "logit_bias.5"),
        (dict.fromkeys(range(1025), 1.0), "logit_bias"),
    ],
)
def test_biases_are_refused_alike(client: Client, bias: dict[int, float], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("in", Sampling(logit_bias=bias), model="tiny")
    assert caught.value.field == f"sampling.{field}"
    given = {str(token_id): amount for token_id, amount in bias.items()}
    body = {**GOOD[http_calls.COMPLETIONS], "logit_bias": given}
    said = refusal(call(UPSTREAM, http_calls.COMPLETIONS, body), 400, field)
    assert said.replace("'-1'", "-1") == f"{field}: {caught.value.message}"


@pytest.mark.parametrize("bad", [[], "x", {"x": 1}, {"1.5": 1}, {"5": "1"}, {"5": True}, {"": 1}])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_bias_is_refused(path: str, bad: Any) -> None:
    where = "logit_bias.5" if isinstance(bad, dict) and "5" in bad else "logit_bias"
    refusal(call(UPSTREAM, path, {**GOOD[path], "logit_bias": bad}), 400, where)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "x" * 100_000,
        "in " * CONTEXT,
        [],
        [-1],
        [5, -(2**63)],
        [5, vocab_size()],
        [2**63 - 1],
        [5] * CONTEXT,
    ],
)
def test_prompts_are_refused_alike(client: Client, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, model="tiny")
    where = caught.value.field.replace("prompt_token_ids.ids", "prompt")
    body = {"model": "tiny", "prompt": prompt}
    said = refusal(call(UPSTREAM, http_calls.COMPLETIONS, body), 400, where)
    assert said == f"{where}: {caught.value.message}"


@pytest.mark.parametrize("role", ["robot", "", "USER"])
def test_roles_are_refused_alike(client: Client, role: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(messages=[Message(role, "my secret")], model="tiny")
    assert caught.value.field == "messages[0].role"
    body = {"model": "tiny", "messages": [{"role": role, "content": "my secret"}]}
    said = refusal(call(UPSTREAM, http_calls.CHAT, body), 400, "messages[0].role")
    assert said == f"messages[0].role: {caught.value.message}"
    assert "secret" not in said


def test_an_unknown_model_is_refused_alike(client: Client) -> None:
    with pytest.raises(UnknownModelError) as caught:
        client.generate("in", model="nope")
    body = {"model": "nope", "prompt": "in"}
    said = refusal(call(UPSTREAM, http_calls.COMPLETIONS, body), 404, "model")
    assert said.removeprefix("model: ") == caught.value.message.removeprefix("model: ")


@pytest.mark.parametrize("bad", ["1", "", [0.5], {}, True, "NaN"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_number_is_refused(path: str, field: str, bad: Any) -> None:
    refusal(call(UPSTREAM, path, {**GOOD[path], field: bad}), 400, field)


@pytest.mark.parametrize("path", PATHS)
def test_a_least_number_of_tokens_is_not_passed_over(path: str) -> None:
    body = {**GOOD[path], "min_tokens": 5, "max_tokens": 2}
    refusal(call(UPSTREAM, path, body), 400, "min_tokens")


def known() -> list[tuple[str, type[Request], str]]:
    return [(path, kind, name) for path, kind in PATHS.items() for name in kind.others]


@pytest.mark.parametrize(("path", "kind", "name"), known())
def test_a_known_field_passes_at_its_defaults_alone(
    path: str, kind: type[Request], name: str
) -> None:
    harmless = kind.others[name]
    upstream = FakeUpstream(says("x"))
    passing = [None, {"any": "thing"}] if harmless is ANY else [None, *harmless]
    for value in passing:
        assert call(upstream, path, {**GOOD[path], name: value}).status_code == 200
    assert len(upstream.requests) == len(passing)
    if harmless is not ANY:
        for bad in (7, "my value", {"5": 100}, ["my value"]):
            refusal(call(UPSTREAM, path, {**GOOD[path], name: bad}), 400, name)


@pytest.mark.parametrize("name", ["length_scale", "beam_width", "Temperature", "\ud800", ""])
@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_field_is_refused_by_name(path: str, name: str) -> None:
    said = refusal(call(UPSTREAM, path, {**GOOD[path], name: 1}), 400, _shown(name))
    assert "unknown field" in said


def _shown(name: str) -> str:
    """How a field is named in JSON, which has no halves of surrogate pairs."""
    return name.encode("utf-8", "backslashreplace").decode() or "''"


def test_nothing_that_was_refused_went_on() -> None:
    assert UPSTREAM.requests == []
