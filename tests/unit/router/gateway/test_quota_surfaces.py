"""Quotas as clients of HTTP and gRPC meet them: headers, errors, priorities; and what they cost."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.datastructures import Headers

from cluster.errors import OverloadedError
from router.client import Client, Sampling
from router.gateway.limits.charges import BODY_BYTES_PER_TOKEN, Charges
from router.gateway.limits.quotas import RATE_HEADERS
from router.gateway.metrics import Metrics
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.security.keys import Role
from router.security.keys_file import add_key
from router.security.limits import KeyLimits
from tests.unit.gateway_fakes import FakeUpstream, Servicer, http_app, says, serve_grpc, tokenizer
from tests.unit.http_calls import CHAT, COMPLETIONS, HELLO, call
from tests.unit.router.gateway.limits.test_quotas import Clock
from tests.unit.router.gateway.predict.v2_calls import Infer, http_body, tensor

PROMPT = "in the beginning"
PROMPT_TOKENS = len(tokenizer().encode(PROMPT))
WAS_TOKENS = len(tokenizer().encode(" was"))
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
TOKENS = PROMPT_TOKENS + 10


class Gateway:
    """An app and its clock, with a key ``limited`` and a key ``free`` of other names."""

    def __init__(
        self, folder: Path, limits: KeyLimits, upstream: FakeUpstream | None = None
    ) -> None:
        file = folder / "keys.yaml"
        self.limited = add_key(file, "limited", [Role.INFERENCE], limits)
        self.free = add_key(file, "free", [Role.INFERENCE])
        self.clock = Clock()
        self.upstream = upstream or FakeUpstream(says(" was"))
        self.access = Access(Keyring(file), Metrics().refused_caller, slow_s=0.0)
        self.app = http_app(self.upstream, access=self.access, clock=self.clock)

    def post(self, path: str, body: Any, key: str | None = None, **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                form = {"content": body} if isinstance(body, bytes) else {"json": body}
                headers["authorization"] = f"Bearer {key or self.limited}"
                return await client.post(path, headers=headers, **form)

        return asyncio.run(asyncio.wait_for(send(), 20))


def rates(answer: httpx.Response) -> list[str]:
    return [answer.headers[name] for name in RATE_HEADERS]


def test_answers_and_refusals_tell_what_is_left(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, KeyLimits(requests_per_s=2, tokens_per_min=6000))
    answer = gateway.post(COMPLETIONS, BODY)
    assert answer.status_code == 200
    # The reply begins when its call has ended, and has given back what it has not used.
    used = PROMPT_TOKENS + WAS_TOKENS
    reset = f"{used / 100:g}s" if used >= 100 else f"{used * 10}ms"
    assert rates(answer) == ["2", "1", "500ms", "6000", str(6000 - used), reset]
    assert gateway.post(CHAT, {"model": "tiny", "messages": HELLO}).status_code == 200
    refused = gateway.post(COMPLETIONS, BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    told = refused.json()["error"]["message"]
    assert "too little is left of this key's requests_per_s, 2" in told
    assert refused.headers["retry-after"] == "1"
    assert rates(refused)[:3] == ["2", "0", "1s"]
    gateway.clock.now_s += 0.5
    assert gateway.post(COMPLETIONS, BODY).status_code == 200


def test_a_wrong_body_costs_its_bytes_and_a_stream_begins_with_all_that_it_may_use(
    tmp_path: Path,
) -> None:
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=6000))
    left = 6000
    for wrong in ({"model": "none"}, {"max_tokens": -1}, {"top_p": 2}):
        answer = gateway.post(COMPLETIONS, BODY | wrong)
        assert answer.status_code in (400, 404)
        left -= 1 + len(answer.request.content) // BODY_BYTES_PER_TOKEN
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(left)
    assert gateway.post(COMPLETIONS, BODY, "em-wrong").status_code == 401
    answer = gateway.post(COMPLETIONS, {**BODY, "stream": True})
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - TOKENS)
    assert "x-ratelimit-limit-requests" not in answer.headers
    after = gateway.post("/tokenize", {"model": "tiny", "prompt": PROMPT})
    left -= PROMPT_TOKENS + WAS_TOKENS + after.json()["count"]
    assert after.headers["x-ratelimit-remaining-tokens"] == str(left)
    refused = gateway.post(COMPLETIONS, {**BODY, "stream": True, "n": 2}, gateway.free)
    assert not set(RATE_HEADERS) & set(refused.headers)


def test_a_name_that_owes_tokens_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=60))
    long = {"model": "tiny", "prompt": PROMPT * 60}
    num_tokens = gateway.post("/tokenize", long).json()["count"]
    assert num_tokens > 60
    refused = gateway.post(COMPLETIONS, b"no JSON", **{"content-type": "application/json"})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) == num_tokens - 60 + 1
    gateway.clock.now_s += num_tokens - 60 + 1
    read = gateway.post(COMPLETIONS, b"no JSON", **{"content-type": "application/json"})
    assert read.status_code == 400


def test_a_form_is_paid_for_and_so_are_prompts_of_refused_calls(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=600))
    body = {**BODY, "structured_outputs": {"choice": [" was"] * 20}}
    answer = gateway.post(COMPLETIONS, body)
    assert answer.status_code == 200
    left = 600 - PROMPT_TOKENS - WAS_TOKENS
    left -= 1 + len(answer.request.content) // BODY_BYTES_PER_TOKEN
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left)
    refused = gateway.post(COMPLETIONS, {**BODY, "max_tokens": 60, "n": 10})
    assert refused.status_code == 413
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(left - PROMPT_TOKENS)


def test_a_call_with_several_prompts_is_one_request_of_all_its_tokens(tmp_path: Path) -> None:
    limits = KeyLimits(requests_per_s=1, tokens_per_min=2 * PROMPT_TOKENS + 4 * 10)
    gateway = Gateway(tmp_path, limits)
    body = {**BODY, "prompt": [PROMPT, PROMPT], "n": 2}
    assert len(gateway.post(COMPLETIONS, body).json()["choices"]) == 4
    gateway.clock.now_s += 60.0
    large = gateway.post(COMPLETIONS, {**body, "max_tokens": 11})
    assert large.status_code == 413
    assert "retry-after" not in large.headers
    assert "this key's tokens_per_min is" in large.json()["error"]["message"]


def test_a_call_that_fails_gives_back_what_it_has_not_generated(tmp_path: Path) -> None:
    upstream = FakeUpstream(lambda request: [OverloadedError("the router is full", "", 1.0)])
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=6000), upstream)
    for number in (1, 2, 3):
        answer = gateway.post(COMPLETIONS, {**BODY, "stream": number == 3})
        assert answer.status_code == 429
        left = str(6000 - number * PROMPT_TOKENS)
        assert answer.headers["x-ratelimit-remaining-tokens"] == left


def test_a_row_of_a_mixture_is_a_token(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=7))
    path = "/v2/models/digits/infer"

    def ask(rows: int) -> httpx.Response:
        pixels = tensor("pixels", np.ones((rows, 4), np.float32))
        body, headers = http_body(Infer("digits", [pixels]))
        return gateway.post(path, body, **headers)

    assert ask(8).status_code == 413
    assert ask(5).headers["x-ratelimit-remaining-tokens"] == "2"
    refused = ask(3)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, str(-(-60 // 7)))
    assert set(refused.json()) == {"error"}


@pytest.mark.parametrize(
    ("given", "least", "expected"),
    [(None, 5, 5), (-9, 5, 5), (7, 5, 7), (-9, -2, -2), (None, -2, 0), (-9, None, -9)],
)
def test_no_request_is_more_urgent_than_its_key(
    tmp_path: Path, given: int | None, least: int | None, expected: int
) -> None:
    gateway = Gateway(tmp_path, KeyLimits(priority=least))
    body = BODY if given is None else {**BODY, "priority": given}
    assert gateway.post(COMPLETIONS, body).status_code == 200
    [request] = gateway.upstream.requests
    assert (request.priority, request.tenant) == (expected, "limited")


def test_without_keys_nobody_is_told_apart() -> None:
    upstream = FakeUpstream(says(" was"))
    assert call(upstream, COMPLETIONS, {**BODY, "user": "alice", "priority": -3}).status_code == 200
    assert (upstream.requests[0].priority, upstream.requests[0].tenant) == (-3, "")


def test_grpc_has_the_same_quotas_and_the_time_to_come_back(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, KeyLimits(tokens_per_min=60, requests_per_s=100))
    servicer = Servicer(gateway.upstream, access=gateway.access, clock=gateway.clock)
    used = PROMPT_TOKENS + WAS_TOKENS
    sampling = Sampling(max_tokens=60 - used - PROMPT_TOKENS + 1, temperature=0.0)
    with (
        serve_grpc(servicer) as address,
        Client(address, retry=None, api_key=gateway.limited) as client,
        Client(address, retry=None, api_key=gateway.free) as other,
    ):
        assert client.generate(PROMPT, Sampling(max_tokens=4, temperature=0.0))[0].text == " was"
        for ask in (client.generate, lambda *given: list(client.stream(*given))):
            with pytest.raises(OverloadedError, match="this key's tokens_per_min, 60") as refused:
                ask(PROMPT, sampling)
            gateway.clock.now_s += PROMPT_TOKENS  # which were tokenised
            assert refused.value.retry_after_s == pytest.approx(1.0 + PROMPT_TOKENS)
        with pytest.raises(OverloadedError, match="this key's tokens_per_min is 60"):
            client.generate(PROMPT, Sampling(max_tokens=60 - PROMPT_TOKENS + 1))
        gateway.clock.now_s += PROMPT_TOKENS
        assert other.generate(PROMPT, sampling)[0].text == " was"
        gateway.clock.now_s += 1.0
        pieces = client.stream(PROMPT, sampling)
        assert "".join(piece.text for piece in pieces) == " was"


MAX_CALLS = 230


@pytest.mark.parametrize("num_names", [1, 50])
def test_a_request_is_few_calls_for_any_number_of_keys(tmp_path: Path, num_names: int) -> None:
    """Its check, its charge and its headers."""
    file = tmp_path / "keys.yaml"
    limits = KeyLimits(requests_per_s=1e6, tokens_per_min=10**12, concurrent_tokens=10**9)
    keys = [add_key(file, f"n{i}", [Role.INFERENCE], limits) for i in range(num_names)]
    metrics = Metrics()
    access, charges = Access(Keyring(file), metrics.refused_caller), Charges(metrics)

    async def request(headers: Headers) -> Headers:
        caller = await access.admit("http", headers.getlist(FIELD), Role.INFERENCE)
        with charges.charge(caller, 100) as charge:
            charge.use("prompt", 50)
            charge.use("generated", 40)
        return Headers(raw=charges.headers(caller))

    num_calls = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    async def requests() -> None:
        shown = [Headers({FIELD: f"Bearer {key}", "host": "x"}) for key in keys]
        for noted in (None, note):  # a name's first request makes its limits and metrics
            for headers in shown:
                sys.setprofile(noted)
                reply = await request(headers)
                sys.setprofile(None)
                assert reply.keys() == list(RATE_HEADERS)

    asyncio.run(requests())
    assert 0 < num_calls / num_names < MAX_CALLS
