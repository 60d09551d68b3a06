"""The OpenAI surface over a scripted upstream: answers, streams, metrics, disconnects."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from cluster.errors import InternalError
from router.control.readiness import Readiness
from router.messages.request import GenerationRequest, TokenEvent, TokenLogprobs
from tests.unit.gateway_fakes import FakeUpstream, http_app, says, tokenizer
from tests.unit.http_calls import COMPLETIONS, OF_JSON, call, chat, completion, events

WHOLE_AND_STREAM = pytest.mark.parametrize("stream", [False, True])
OF_USAGE = {"stream_options": {"include_usage": True}}


def choices_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the choices of an answer; those of a stream are put together."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
    found: dict[int, dict[str, Any]] = {}
    for part in (choice for chunk in events(response) for choice in chunk["choices"]):
        choice = found.setdefault(part["index"], {"text": "", "token_ids": [], "logprobs": {}})
        for name, value in part.items():
            if name in ("text", "token_ids"):
                choice[name] += value
            elif name == "logprobs" and value:
                for column, rows in value.items():
                    choice["logprobs"].setdefault(column, []).extend(rows)
            elif name != "logprobs":
                choice[name] = value
    return [choice for _, choice in sorted(found.items())]


@WHOLE_AND_STREAM
def test_a_completion(stream: bool) -> None:
    text, upstream = " beginning 🙂", FakeUpstream(says(" beginning 🙂"))
    asked = {"prompt": [7, 8], "max_tokens": 9, "seed": 4, "temperature": 0.5}
    options: dict[str, Any] = {"stream": True, **OF_USAGE} if stream else {}
    response = completion(upstream, return_token_ids=True, **asked, **options)
    assert response.status_code == 200
    bodies = events(response) if stream else [response.json()]
    assert {body["object"] for body in bodies} == {"text_completion"}
    assert {body["id"] for body in bodies} == {f"cmpl-{response.headers['x-request-id']}"}
    ids = tokenizer().encode(text)
    [choice] = choices_of(response)
    assert choice == {
        "index": 0, "text": text, "logprobs": {} if stream else None, "finish_reason": "length",
        "exact": True, "token_ids": ids, "prompt_token_ids": [7, 8],
    }  # fmt: skip
    *before, last = bodies
    assert {body["usage"] for body in before} <= {None}
    assert last["usage"] == {
        "prompt_tokens": 2, "completion_tokens": len(ids), "total_tokens": 2 + len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    if stream:
        assert last["choices"] == []
        parts = [body["choices"][0] for body in before]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(before) - 1) + ["length"]
        assert "prompt_token_ids" in parts[0]
        assert not any("prompt_token_ids" in part for part in parts[1:])
    else:
        assert response.headers["x-expertmesh-exact"] == "true"
    sampling = upstream.requests[0].sampling
    assert (sampling.max_tokens, sampling.seed, sampling.temperature) == (9, 4, 0.5)


def test_a_stream_has_usage_where_it_is_asked_for() -> None:
    chunks = events(completion(FakeUpstream(says(" was")), stream=True))
    assert not any("usage" in chunk for chunk in chunks)


def found_of_prompts(request: GenerationRequest) -> Iterator[TokenEvent]:
    """Choice i finds 16 (2 + i) tokens of the prompt; a later router's word does not count."""
    for index in range(request.sampling.n):
        yield TokenEvent(index, (5,), cached_tokens=16 * (2 + index))
        yield TokenEvent(index, (6,), start=1, finish_reason="length", cached_tokens=1)


@pytest.mark.parametrize(("n", "prompts", "cached"), [(1, 1, 32), (3, 1, 32), (2, 4, 128)])
@WHOLE_AND_STREAM
def test_usage_has_what_was_found_of_prompts(
    n: int, prompts: int, cached: int, stream: bool
) -> None:
    options: dict[str, Any] = {"stream": True, **OF_USAGE} if stream else {}
    upstream = FakeUpstream(found_of_prompts)
    response = completion(upstream, n=n, prompt=["in the"] * prompts, cache_salt="s", **options)
    usage = (events(response)[-1] if stream else response.json())["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
    assert {request.cache_salt for request in upstream.requests} == {"s"}


@WHOLE_AND_STREAM
def test_prompts_and_choices_are_numbered(stream: bool) -> None:
    upstream = FakeUpstream(says(" was"))
    response = completion(upstream, prompt=["in", [5, 6, 7], "the word"], n=2, stream=stream)
    found = [(choice["index"], choice["text"]) for choice in choices_of(response)]
    assert found == [(index, " was") for index in range(6)]
    in_, word = (tuple(tokenizer().encode(text)) for text in ("in", "the word"))
    assert {request.prompt_token_ids for request in upstream.requests} == {in_, (5, 6, 7), word}


@WHOLE_AND_STREAM
def test_a_character_of_several_tokens_counts_once_in_text_offset(stream: bool) -> None:
    text = " in ü in"
    ids = tokenizer().encode(text, add_special_tokens=False)
    response = completion(FakeUpstream(says(text)), logprobs=0, stream=stream)
    offsets = choices_of(response)[0]["logprobs"]["text_offset"]
    before = [b"".join(map(tokenizer().token_bytes, ids[:n])) for n in range(len(ids))]
    assert any(piece != piece.decode(errors="ignore").encode() for piece in before)
    assert offsets == [len(piece.decode(errors="ignore")) for piece in before]


@WHOLE_AND_STREAM
def test_completion_logprobs(stream: bool) -> None:
    texts = [tokenizer().token_text(one) for one in tokenizer().encode(" was the")]
    response = completion(FakeUpstream(says(" was the")), logprobs=2, stream=stream)
    logprobs = choices_of(response)[0]["logprobs"]
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [-0.25] * len(texts)
    assert logprobs["text_offset"] == [len("".join(texts[:n])) for n in range(len(texts))]
    assert logprobs["top_logprobs"][0][texts[0]] == -0.25


@WHOLE_AND_STREAM
def test_a_logprob_of_minus_infinity_can_be_sent(stream: bool) -> None:
    row = TokenLogprobs(-math.inf, (5, 6), (-0.5, -math.inf))
    upstream = FakeUpstream(lambda request: [TokenEvent(0, (5,), (row,), "length")])
    response = completion(upstream, logprobs=2, stream=stream)
    logprobs = choices_of(response)[0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert sorted(logprobs["top_logprobs"][0].values()) == [-9999.0, -0.5]
    assert "Infinity" not in response.text


@WHOLE_AND_STREAM
def test_a_stop_string_cuts_the_text_and_ends_the_choice_upstream(stream: bool) -> None:
    upstream = FakeUpstream(says(" was the word", finish_reason=None), endless=True)
    [choice] = choices_of(completion(upstream, stop=["the wo"], stream=stream))
    assert (choice["text"], choice["finish_reason"]) == (" was ", "stop")
    assert upstream.stopped == [(upstream.requests[0].request_id, 0)]
    assert upstream.closed.is_set()


def test_a_stopped_choice_waits_for_the_others() -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        word, other = tokenizer().encode("stop"), tokenizer().encode("in the word")
        return [
            TokenEvent(0, tuple(word)),
            TokenEvent(1, tuple(other[:1])),
            TokenEvent(0, tuple(other)),
            TokenEvent(0, (), finish_reason="length"),
            TokenEvent(1, tuple(other[1:]), finish_reason="length"),
        ]

    body = completion(FakeUpstream(script), stop="stop", n=2).json()
    assert [one["text"] for one in body["choices"]] == ["", "in the word"]
    assert [one["finish_reason"] for one in body["choices"]] == ["stop", "length"]
    used = len(tokenizer().encode("stop")) + len(tokenizer().encode("in the word"))
    assert body["usage"]["completion_tokens"] == used


def test_a_chat() -> None:
    upstream = FakeUpstream(says("the word"))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "in"}], "name": "ann"},
    ]
    body = chat(upstream, messages=messages, max_completion_tokens=12).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "the word"}
    prompt = "system: be brief\nuser: in\nassistant:"
    assert upstream.requests[0].prompt_token_ids == tuple(tokenizer().encode(prompt))
    assert upstream.requests[0].sampling.max_tokens == 12


def test_a_streamed_chat() -> None:
    chunks = events(chat(FakeUpstream(says("the word")), stream=True, n=2))
    opening = [chunk["choices"][0]["delta"] for chunk in chunks[:2]]
    assert opening == [{"role": "assistant", "content": ""}] * 2
    texts = {0: "", 1: ""}
    for chunk in chunks[2:]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "the word", 1: "the word"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_chat_logprobs() -> None:
    upstream = FakeUpstream(says("the word"))
    body = chat(upstream, logprobs=True, top_logprobs=2, return_token_ids=True).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content) == b"the word"
    assert [len(one["top_logprobs"]) for one in content] == [2] * len(content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert body["prompt_token_ids"] == list(upstream.requests[0].prompt_token_ids)
    plain = chat(FakeUpstream(says("the word")), logprobs=True).json()
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def loses_an_expert(request: GenerationRequest) -> Iterable[TokenEvent]:
    """Choice 0 is exact to its end; choice 1 is not from its second token on."""
    for place in range(3):
        reason = "length" if place == 2 else None
        for index in range(2):
            exact = index == 0 or place == 0
            yield TokenEvent(index, (70 + place,), (), reason, exact, place)


@pytest.mark.parametrize("ask", [completion, chat])
def test_what_is_not_exact_is_flagged(ask: Callable[..., httpx.Response]) -> None:
    whole = ask(FakeUpstream(loses_an_expert), n=2)
    assert whole.headers["x-expertmesh-exact"] == "false"
    assert [choice["exact"] for choice in whole.json()["choices"]] == [True, False]
    chunks = events(ask(FakeUpstream(loses_an_expert), n=2, stream=True, return_token_ids=True))
    told: dict[int, list[bool | None]] = {0: [], 1: []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        if "token_ids" in choice:
            told[choice["index"]].append(choice.get("exact"))
    assert told == {0: [None, None, True], 1: [None, False, False]}


@pytest.mark.parametrize(("given", "is_kept"), [("abc-1", True), ("a b\tc", False)])
def test_the_callers_request_id_is_kept_if_it_is_sensible(given: str, is_kept: bool) -> None:
    answer = call(FakeUpstream(says("x")), "/health", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) == is_kept


@pytest.mark.parametrize(
    ("reason", "names", "age_s"),
    [
        ("", (3, 7), 0.25),
        ("2 experts have no live copy", (3, 8), 90.0),
        ("nothing is known yet", None, None),
    ],
)
def test_health_and_readiness(
    reason: str, names: tuple[int, int] | None, age_s: float | None
) -> None:
    upstream = FakeUpstream(says("x"))
    upstream.readiness = Readiness(reason, names, age_s)
    assert call(upstream, "/health").status_code == 200
    assert len(call(upstream, "/v1/models").json()["data"]) == 2  # a list of names, not of states
    response = call(upstream, "/ready")
    assert response.status_code == (503 if reason else 200)
    epoch, version = names or (None, None)
    assert response.json() == {
        "ready": not reason,
        "reason": reason or None,
        "epoch": epoch,
        "placement_version": version,
        "controller_loop_age_s": age_s,
        "failed_deploy": None,
    }
    upstream.readiness = Readiness(reason, names, age_s, failed_deploy="no folder")
    told = call(upstream, "/ready")
    assert (told.status_code, told.json()["failed_deploy"]) == (response.status_code, "no folder")


def test_newcomers_are_told_where_to_go() -> None:
    upstream = FakeUpstream(says("x"))
    front = call(upstream, "/").json()
    assert front == call(upstream, "/v1").json()
    for page in ("documentation", "openapi", "models"):
        assert call(upstream, front[page]).status_code == 200
    docs = call(upstream, "/docs")
    assert "/openapi.json" in docs.text
    assert "connect-src 'self'" in docs.headers["content-security-policy"]


REPLICA = 'replica="n1:43"'
OF_TINY = f'{{model_name="tiny",{REPLICA}}}'


def test_metrics_count_requests_tokens_by_exactness_and_actors() -> None:
    upstream = FakeUpstream(says(" was"))

    async def run() -> tuple[str, str]:
        transport = httpx.ASGITransport(http_app(upstream))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "tiny", "prompt": [5, 6]}
            assert (await client.post(COMPLETIONS, json=body)).status_code == 200
            await client.post(COMPLETIONS, json={**body, "n": 0})
            await client.post(COMPLETIONS, content=b"{", headers=OF_JSON)
            upstream.script = lambda request: [InternalError("x")]
            await client.post(COMPLETIONS, json=body)
            upstream.script = loses_an_expert
            await client.post(COMPLETIONS, json={**body, "n": 2, "on_expert_loss": "drop"})
            first = (await client.get("/metrics")).text
            upstream.controller.is_away = True
            upstream.readiness = Readiness("", (3, 7), 60.0)
            return first, (await client.get("/metrics")).text

    told, away = asyncio.run(asyncio.wait_for(run(), 20))
    lines = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))
    expected = {
        f'requests_total{{code="ok",{REPLICA},surface="http"}}': 2,
        f'requests_total{{code="invalid_argument",{REPLICA},surface="http"}}': 2,
        f'requests_total{{code="internal",{REPLICA},surface="http"}}': 1,
        f"prompt_tokens_total{OF_TINY}": 6,
        f"generation_tokens_total{OF_TINY}": len(tokenizer().encode(" was")) + 6,
        f'inexact_tokens_total{{model_name="tiny",reason="drop",{REPLICA}}}': 2,
        f"requests_in_flight{OF_TINY}": 0,
        f'request_success_total{{finished_reason="length",model_name="tiny",{REPLICA}}}': 3,
        f"time_to_first_token_seconds_count{OF_TINY}": 2,
        f"e2e_request_latency_seconds_count{OF_TINY}": 3,
        'expert_tokens_total{actor_id="a0",expert="5",layer="1",model_name="tiny"}': 9,
        'actor_replacements_total{actor_id="a0"}': 1,
        'actor_busy_seconds_total{actor_id="a0"}': 1.5,
        'processes{kind="router"}': 1,
        'kernel_processes{kernel_class="fused",kind="actor",model_name="tiny"}': 2,
        'kernel_processes{kernel_class="torch-avx2",kind="router",model_name="tiny"}': 1,
        "controller_loop_age_seconds": 0.25,
        "placement_version": 7,
        "missing_experts": 0,
    }
    assert {name: float(lines[f"expertmesh_{name}"]) for name in expected} == expected
    assert "expertmesh_controller_loop_age_seconds 60.0" in away
    assert "expertmesh_expert_tokens_total{" not in away
    assert f'expertmesh_requests_total{{code="ok",{REPLICA},surface="http"}} 2.0' in away
    assert "expertmesh_missing_experts NaN" in away


@pytest.mark.parametrize(
    ("body", "streamed"), [({}, False), ({"stop": ["x"]}, True), ({"stream": True}, True)]
)
def test_streams_and_stop_strings_need_tokens_as_they_come(
    body: dict[str, Any], streamed: bool
) -> None:
    upstream = FakeUpstream(says(" was"))
    assert completion(upstream, **body).status_code == 200
    assert chat(upstream, **body).status_code == 200
    assert [request.streamed for request in upstream.requests] == [streamed, streamed]
