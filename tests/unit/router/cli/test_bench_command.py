"""``expertmesh bench``: what is asked, what is measured, what its exit code says."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.errors import InternalError, OverloadedError
from router.cli.app import app
from router.messages.request import GenerationRequest, TokenEvent
from router.ops.load_test import Samples
from tests.unit.gateway_fakes import FakeUpstream, grpc_server, says, tokenizer, vocab_size
from tests.unit.terminal import Terminal

TEXT = " was the word"
NUM_TOKENS = len(tokenizer().encode(TEXT))


def bench(address: str, *words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "--address", address, "--json", *words])
    assert (result.exit_code, result.stderr) == (code, "")
    return json.loads(result.stdout)


@pytest.mark.parametrize("requests", [1, 50])
def test_every_request_is_made_once_and_measured(
    address: str, upstream: FakeUpstream, requests: int
) -> None:
    told = bench(address, "--requests", str(requests), "--max-tokens", "9")
    assert len(upstream.requests) == requests
    assert (told["succeeded"], told["failed"], told["failures"]) == (requests, 0, {})
    assert (told["clients"], told["requests"], told["max_tokens"]) == (8, requests, 9)
    assert told["output_tokens"] == requests * NUM_TOKENS
    assert told["tokens_per_s"] == pytest.approx(told["output_tokens"] / told["elapsed_s"])
    assert told["requests_per_s"] == pytest.approx(requests / told["elapsed_s"])
    for times in ("first_token_ms", "between_tokens_ms", "request_ms"):
        assert 0 <= told[times]["p50"] <= told[times]["p99"] < 1000 * told["elapsed_s"]
    asked = upstream.requests[0]
    assert (asked.sampling.max_tokens, asked.sampling.temperature) == (9, 0.0)
    assert asked.sampling.ignore_eos


def test_no_more_are_under_way_than_asked_for() -> None:
    under_way, most = 0, 0

    class Counting(FakeUpstream):
        async def generate(self, request: GenerationRequest) -> Any:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            try:
                await asyncio.sleep(0.01)
                async for event in super().generate(request):
                    yield event
            finally:
                under_way -= 1

    with grpc_server(Counting(says(TEXT))) as counted:
        assert bench(counted, "--clients", "3", "--requests", "12")["succeeded"] == 12
    assert most == 3


def test_prompts_take_turns_or_are_the_same_random_ones(
    address: str, upstream: FakeUpstream
) -> None:
    bench(address, "--prompt", "in", "--prompt", "the", "--requests", "4", "--clients", "1")
    ids = [tuple(tokenizer().encode(text)) for text in ("in", "the")]
    assert [one.prompt_token_ids for one in upstream.requests] == ids * 2
    del upstream.requests[:]
    for _ in range(2):
        bench(address, "--prompt-tokens", "7", "--requests", "3", "--clients", "1")
    prompts = [one.prompt_token_ids for one in upstream.requests]
    assert prompts[:3] == prompts[3:]
    assert len(set(prompts)) == 3
    assert {len(one) for one in prompts} == {7}
    assert all(0 <= token_id < vocab_size() for one in prompts for token_id in one)


def test_an_answer_in_one_piece_has_no_times_between(address: str, upstream: FakeUpstream) -> None:
    told = bench(address, "--no-stream", "--requests", "5")
    assert told["output_tokens"] == 5 * NUM_TOKENS
    nothing = {"p50": None, "p99": None}
    assert (told["first_token_ms"], told["between_tokens_ms"]) == (nothing, nothing)
    assert told["request_ms"]["p50"] > 0
    assert not upstream.requests[0].streamed


def test_failures_are_counted_by_kind_and_are_1(address: str, upstream: FakeUpstream) -> None:
    def script(request: GenerationRequest) -> Iterator[TokenEvent | Exception]:
        number = len(upstream.requests)
        if number % 3 == 0:
            yield OverloadedError(f"full {number}", retry_after_s=0.01)
        elif number == 4:
            yield InternalError("odd")
        else:
            yield from says(TEXT)(request)

    upstream.script = script
    told = bench(address, "--requests", "9", "--clients", "1", code=1)
    assert told["failures"] == {
        "internal": {"count": 1, "first": "odd"},
        "resource_exhausted": {"count": 3, "first": "full 3"},
    }
    assert (told["succeeded"], told["failed"], len(upstream.requests)) == (5, 4, 9)
    result = CliRunner().invoke(app, ["bench", "--address", address, "--requests", "3"])
    assert result.exit_code == 1
    assert "1 failed, resource_exhausted: full 12" in result.stdout
    assert "tiny: 2 of 3 requests, 8 at once" in result.stdout
    for shown in ("tokens/s", "first token", "between tokens", "whole request", "p50", "p99"):
        assert shown in result.stdout


def test_ctrl_c_tells_what_was_measured(upstream: FakeUpstream) -> None:
    def script(request: GenerationRequest) -> Iterator[TokenEvent | Exception]:
        last = len(upstream.requests) == 3
        yield from says(TEXT, None if last else "length")(request)

    upstream.script, upstream.endless = script, True
    with grpc_server(upstream) as address:
        words = ("--requests", "9", "--clients", "1", "--address", address)
        terminal = Terminal("bench", *words)
        terminal.wait_for("2/9")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("2 of 9 requests")
        terminal.wait_for("whole request")
        assert terminal.end() == 130


@pytest.mark.parametrize("words", ["--clients 0", "--clients 1025", "--requests 100001"])
def test_it_is_bounded(words: str) -> None:
    assert CliRunner().invoke(app, ["bench", *words.split()]).exit_code == 2


def test_nobody_at_the_address_is_3_and_an_unknown_model_1(address: str) -> None:
    assert CliRunner().invoke(app, ["bench", "--address", "127.0.0.1:1"]).exit_code == 3
    result = CliRunner().invoke(app, ["bench", "--address", address, "--model", "nope"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("count", [1, 2, 101, 1000])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    samples = Samples()
    for value in values:
        samples.add(float(value))
    for percent in (50, 99):
        expected = np.percentile(values, percent, method="inverted_cdf")
        assert samples.percentile_ms(percent) == pytest.approx(1000 * expected)
    assert Samples().percentile_ms(50) is None


def test_beyond_its_limit_a_sample_stays_even() -> None:
    samples = Samples(limit=1000)
    for value in range(20_000):
        samples.add(value / 1000)
    assert len(samples._kept) == 1000
    assert samples.percentile_ms(50) == pytest.approx(10_000, rel=0.1)
