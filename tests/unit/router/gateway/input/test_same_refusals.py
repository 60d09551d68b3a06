"""HTTP and gRPC refuse the same in the same words, and HTTP what only it can be sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, UnknownModelError
from router.client import Client, Message, Sampling
from tests.unit.gateway_fakes import CONTEXT, FakeUpstream, grpc_server, says, vocab_size
from tests.unit.http_calls import CHAT, COMPLETIONS, HELLO, call, refusal

UPSTREAM = FakeUpstream(says("x"))
"""Never asked: all that is sent here is refused."""
GOOD: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "in"}, CHAT: {"messages": HELLO}}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with grpc_server(UPSTREAM) as address, Client(address, retry=None) as connected:
        yield connected


def over_http(path: str, where: str, status: int = 400, **fields: Any) -> str:
    body = {"model": "tiny", **GOOD[path], **fields}
    said = refusal(call(UPSTREAM, path, body), status, where)
    assert UPSTREAM.requests == []
    return said


BAD: dict[str, list[Any]] = {
    "max_tokens": [0, -1, -(2**31), 2**31, 2**63 - 1, CONTEXT + 1],
    "temperature": [math.nan, -1.0, -1e-9, math.inf, -math.inf, 100.5],
    "top_p": [0.0, -0.5, 1.0000001, math.nan, math.inf],
    "min_p": [-0.1, 1.1, math.nan],
    "top_k": [-2, 2**31],
    "n": [0, -1, 17, 2**31],
    "logprobs": [-1, 21, 2**31],
    "prompt_logprobs": [-1, 21, 2**31],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "presence_penalty": [-2.1, 2.1, math.inf],
    "repetition_penalty": [0.0, -1.0, 2.5, math.nan],
    "min_tokens": [-1, 17, 2**63 - 1],
    "stop_token_ids": [[-1], [vocab_size()], [5] * 129],
    "bad_words": [[""], [" "], ["a" * 257], ["a"] * 129],
    "stop": [["a"] * 17, ["a", ""], ["a" * 257]],
    "logit_bias": [{-1: 1.0}, {vocab_size(): 1.0}, dict.fromkeys(range(1025), 1.0)],
    "logit_bias.5": [{5: 100.5}, {5: math.nan}],
    "prompt": [
        "", "x" * 100_000, "in " * CONTEXT, [], [-1], [5, -(2**63)], [5, vocab_size()],
        [2**63 - 1], [5] * CONTEXT,
    ],
    "messages[0].role": ["robot", "", "USER"],
}  # fmt: skip


@pytest.mark.parametrize(("where", "bad"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_a_bad_value_is_refused_alike(client: Client, where: str, bad: Any) -> None:
    field, of_json, path = where.partition(".")[0], bad, COMPLETIONS
    if field == "logit_bias":
        of_json = {str(token_id): amount for token_id, amount in bad.items()}
    if field == "prompt":
        asked: dict[str, Any] = {"prompt": bad}
    elif field == "messages[0]":
        asked = {"messages": [Message(bad, "my secret")]}
        field, path, of_json = "messages", CHAT, [{"role": bad, "content": "my secret"}]
    else:
        asked = {"prompt": "in", "sampling": Sampling(**{field: bad})}
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(model="tiny", **asked)
    named = caught.value.field.removeprefix("sampling.").replace("prompt_token_ids.ids", "prompt")
    assert named.startswith(where)
    said = over_http(path, named, **{field: of_json})
    assert said.replace("'-1'", "-1") == f"{named}: {caught.value.message}"
    assert "secret" not in said


def test_an_unknown_model_is_refused_alike(client: Client) -> None:
    with pytest.raises(UnknownModelError) as caught:
        client.generate("in", model="nope")
    said = over_http(COMPLETIONS, "model", 404, model="nope")
    assert said.removeprefix("model: ") == caught.value.message.removeprefix("model: ")


@pytest.mark.parametrize("bad", [[], "x", {"x": 1}, {"1.5": 1}, {"5": "1"}, {"5": True}, {"": 1}])
@pytest.mark.parametrize("path", GOOD)
def test_what_is_no_bias_is_refused(path: str, bad: Any) -> None:
    over_http(path, "logit_bias.5" if "5" in bad else "logit_bias", logit_bias=bad)


@pytest.mark.parametrize("name", ["length_scale", "beam_width", "Temperature", "\ud800", ""])
@pytest.mark.parametrize("path", GOOD)
def test_an_unknown_field_is_refused_by_name(path: str, name: str) -> None:
    # JSON has no halves of surrogate pairs.
    shown = name.encode("utf-8", "backslashreplace").decode() or "''"
    assert "unknown field" in over_http(path, shown, **{name: 1})
