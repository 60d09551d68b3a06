"""Bad input over real HTTP and gRPC: a clear refusal, the same processes, the next one answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from cluster.errors import ExpertMeshError, InvalidRequestError, UnknownModelError
from router.client import Sampling
from tests.checkpoints import VOCAB_SIZE
from tests.cluster_fixture import RANDOM, RANDOM_CONTEXT, ServedCluster, greedy, prompt_of

GOOD = {"model": RANDOM, "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}


@pytest.fixture(autouse=True)
def unharmed(served: ServedCluster) -> Iterator[None]:
    """After each test the next good requests are answered, by the same processes."""
    before = served.pids()
    yield
    [reply] = served.client.generate([5, 6, 7], greedy(4), model=RANDOM, timeout_s=20)
    assert reply.token_ids == served.expected([5, 6, 7], 4)
    assert httpx.post(f"{served.http_url}/v1/completions", json=GOOD).status_code == 200
    assert served.running() == 0
    assert served.pids() == before


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "nope"}, 404, "model"),
        ({"model": 5}, 400, "model"),
        ({"flavour": "sweet"}, 400, "flavour"),
        ({"prompt": [5, VOCAB_SIZE]}, 400, "prompt[1]"),
        ({"prompt": [5, -1]}, 400, "prompt[1]"),
        ({"prompt": [2**70]}, 400, "prompt[0]"),
        ({"prompt": [1.5]}, 400, "prompt[0]"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": [5] * RANDOM_CONTEXT}, 400, "prompt"),
        ({"prompt": "x" * 100_000}, 400, "prompt"),
        ({"max_tokens": RANDOM_CONTEXT}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 2**31}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 10_000}, 400, "n"),
        ({"timeout_s": -1}, 400, "timeout_s"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(
    served: ServedCluster, change: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    body = {**GOOD, **change, "stream": stream}
    response = httpx.post(f"{served.http_url}/v1/completions", json=body, timeout=20)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": ', b"[]", b"\xff\xfe", b"[" * 50_000, b'{"model": NaN, }']
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_broken_json_is_a_bad_request(served: ServedCluster, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(served.http_url + path, content=body, headers=headers, timeout=20)
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role"),
        ([{"role": "user", "content": "x" * 100_000}], "messages"),
    ],
)
def test_bad_messages_are_named(served: ServedCluster, messages: Any, param: str) -> None:
    body = {"model": RANDOM, "messages": messages}
    response = httpx.post(f"{served.http_url}/v1/chat/completions", json=body, timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_unknown_paths_and_methods_are_refused(served: ServedCluster) -> None:
    assert httpx.get(f"{served.http_url}/v1/nothing").status_code == 404
    assert httpx.get(f"{served.http_url}/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("prompt", "sampling", "model", "expected", "field"),
    [
        ("x", Sampling(), "nope", UnknownModelError, ""),
        ("", Sampling(), RANDOM, InvalidRequestError, "prompt"),
        ([], Sampling(), RANDOM, InvalidRequestError, "prompt_token_ids.ids"),
        ([-1], Sampling(), RANDOM, InvalidRequestError, "prompt_token_ids.ids[0]"),
        ([4, VOCAB_SIZE], Sampling(), RANDOM, InvalidRequestError, "prompt_token_ids.ids[1]"),
        (prompt_of(RANDOM_CONTEXT, 1), Sampling(), RANDOM, InvalidRequestError, ""),
        ([4], Sampling(max_tokens=2**31), RANDOM, InvalidRequestError, "sampling.max_tokens"),
        ([4], Sampling(max_tokens=0), RANDOM, InvalidRequestError, "sampling.max_tokens"),
        (
            [4],
            Sampling(temperature=float("nan")),
            RANDOM,
            InvalidRequestError,
            "sampling.temperature",
        ),
        ([4], Sampling(top_p=2.0), RANDOM, InvalidRequestError, "sampling.top_p"),
        ([4], Sampling(n=0), RANDOM, InvalidRequestError, "sampling.n"),
        ([4], Sampling(logprobs=10_000), RANDOM, InvalidRequestError, "sampling.logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_grpc_refuses_the_same(
    served: ServedCluster,
    prompt: str | Sequence[int],
    sampling: Sampling,
    model: str,
    expected: type[ExpertMeshError],
    field: str,
    stream: bool,
) -> None:
    def ask() -> object:
        if stream:
            return list(served.client.stream(prompt, sampling, model=model, timeout_s=20))
        return served.client.generate(prompt, sampling, model=model, timeout_s=20)

    with pytest.raises(expected) as caught:
        ask()
    if field:
        assert caught.value.field == field


def test_a_deadline_that_has_nearly_passed_is_not_unlimited(served: ServedCluster) -> None:
    with pytest.raises(ExpertMeshError) as caught:
        served.client.generate([5], greedy(200), model=RANDOM, timeout_s=0.05)
    assert caught.value.code.value in ("deadline_exceeded", "unavailable")


def test_an_unknown_way_of_losing_experts_is_named(served: ServedCluster) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        served.client.generate([5], greedy(2), model=RANDOM, on_expert_loss="guess")
    assert caught.value.field == "on_expert_loss"
