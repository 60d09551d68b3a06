"""The controller or a router dies, or a whole application goes: what stays behind is right."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from ray import serve

from benchmarks.shipped import free_ports, with_ports
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.quantization import MXFP4
from router.app import build
from router.client import Reply
from tests.cluster_fixture import (
    APP,
    RANDOM,
    TINY,
    ServedCluster,
    StreamReader,
    greedy,
    is_alive,
    prompt_of,
    transformers_tokens,
    wait_until,
)
from tests.fault.faults import (
    LENGTH,
    PROMPTS,
    actor_names,
    check_forms,
    constrained_tokens,
    drawn_experts,
    expected_tokens,
    kill,
    longest_gap_s,
    start_constrained,
    start_streams,
)
from tests.quantise import CASES, make

BACK_S = 40.0
BOTH_BACK_S = 40.0
"""For Serve to notice, a controller to start, and then an actor."""
GONE_S = 60.0
SCORED = [prompt_of(length, length) for length in (40, 97, 130)]
SCORED_LENGTH = 120
THROWAWAY = "throwaway"
ENDLESS = {
    "model": THROWAWAY,
    "prompt": PROMPTS[0],
    "max_tokens": 1000,
    "n": 8,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}
"""A request that takes longer than a deletion may."""


def test_requests_do_not_notice_that_the_controller_is_replaced(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    of_forms = constrained_tokens(served)
    streams = start_streams(served)
    formed = start_constrained(served)
    kill(told, told.controller_pid)
    assert not any(stream.ended for stream in (*streams, *formed))
    new = served.crowd(RANDOM, PROMPTS, [greedy(20)] * len(PROMPTS))
    expected = expected_tokens(served)
    assert new == [tokens[:20] for tokens in expected]
    assert [stream.result() for stream in streams] == expected
    assert [stream.result() for stream in formed] == of_forms
    check_forms(formed)
    after = wait_until(
        lambda: fresh if (fresh := served.status()).controller_pid != told.controller_pid else None,
        "another controller answers",
        BACK_S,
    )
    assert after.epoch > told.epoch
    served.wait_whole()
    ids = {actor_id: (a.pid, a.generation, a.experts) for actor_id, a in before.items()}
    adopted = served.actors()
    assert {i: (a.pid, a.generation, a.experts) for i, a in adopted.items()} == ids


def test_an_actor_that_dies_with_the_controller_is_back_soon(served: ServedCluster) -> None:
    told, before = served.status(), served.actors()
    rows = drawn_experts(served, len(PROMPTS[0]) + LENGTH - 1)
    replay = greedy(LENGTH, routed_experts=rows, return_routed_experts=True)
    [undisturbed] = served.client.generate(PROMPTS[0], replay, model=RANDOM)
    streams = start_streams(served)
    replayed = StreamReader(served.client, PROMPTS[0], replay, RANDOM, 60)
    replayed.wait_tokens(1)
    kill(told, told.controller_pid, before["expert-1"].pid)
    assert not any(stream.ended for stream in (*streams, replayed))
    assert [stream.result() for stream in streams] == expected_tokens(served)
    assert replayed.result() == undisturbed.token_ids
    parts = [p.routed_experts for p in replayed.pieces if p.routed_experts is not None]
    assert np.array_equal(np.concatenate(parts), rows)
    print(f"longest gap without controller and actor: {longest_gap_s(streams):.1f} s")
    assert longest_gap_s(streams) <= BOTH_BACK_S
    after = served.wait_whole()
    assert after.controller_pid != told.controller_pid
    assert served.actors()["expert-1"].generation > before["expert-1"].generation


@dataclass
class Scored:
    """Answers with the log probabilities of their prompts, in pieces and whole."""

    streams: list[StreamReader]
    answers: list[Future[list[Reply]]]
    expected: list[Reply]

    def check(self) -> None:
        """Check that they have come as without a fault."""
        for stream, answer, whole in zip(self.streams, self.answers, self.expected, strict=True):
            assert stream.result(BACK_S) == whole.token_ids
            rows = [row for piece in stream.pieces for row in piece.prompt_logprobs]
            assert tuple(rows) == whole.prompt_logprobs
            assert answer.result(BACK_S) == [whole]


def start_scored(served: ServedCluster, pool: ThreadPoolExecutor) -> Scored:
    """Ask for the same answers as without a fault; streams have begun, and nothing has ended."""
    asked = greedy(SCORED_LENGTH, prompt_logprobs=2, logprobs=1)
    generate = partial(served.client.generate, sampling=asked, model=RANDOM, timeout_s=60)
    expected = [generate(prompt)[0] for prompt in SCORED]
    streams = [StreamReader(served.client, p, asked, RANDOM, 60) for p in SCORED]
    answers = [pool.submit(generate, prompt) for prompt in SCORED]
    for stream in streams:
        stream.wait_tokens(1)
    return Scored(streams, answers, expected)


def test_streams_and_log_probabilities_of_prompts_survive_the_loss_of_every_router(
    served: ServedCluster,
) -> None:
    tiny = served.crowd(TINY, PROMPTS[:2], [greedy(LENGTH)] * 2)
    told, before = served.status(), served.actors()
    pids = [router.pid for router in told.routers]
    sampling = greedy(LENGTH)
    expected = expected_tokens(served)
    with ThreadPoolExecutor(len(SCORED)) as pool:
        scored = start_scored(served, pool)
        tiny_streams = [StreamReader(served.client, p, sampling, TINY, 60) for p in PROMPTS[:2]]
        streams = start_streams(served)
        for stream in tiny_streams:
            stream.wait_tokens(1)
        kill(told, *pids)
        assert not any(stream.ended for stream in (*streams, *tiny_streams, *scored.streams))
        assert not any(answer.done() for answer in scored.answers)
        assert [stream.result() for stream in streams] == expected
        assert [stream.result() for stream in tiny_streams] == tiny
        scored.check()
    after = served.wait_whole()
    assert not {router.pid for router in after.routers} & set(pids)
    assert after.controller_pid == told.controller_pid
    assert served.actors().keys() == before.keys()
    assert all(actor.pid == before[i].pid for i, actor in served.actors().items())


def completed(url: str, prompt: list[int], count: int) -> tuple[int, ...]:
    """Return the greedy tokens that the throwaway application has for a prompt."""
    body = {
        "prompt": prompt,
        "max_tokens": count,
        "stream": False,
        "n": 1,
        "return_token_ids": True,
    }
    reply = httpx.post(url, json=ENDLESS | body, timeout=BACK_S)
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    return tuple(choice["token_ids"])


def test_a_second_application_serves_mxfp4_and_takes_its_actors_with_it_and_no_others(
    served: ServedCluster, tmp_path: Path
) -> None:
    told, main = served.status(), actor_names(APP)
    assert len(main) == len(told.actors)
    made = make(CASES["gpt_oss"], tmp_path, max_position_embeddings=2048)
    assert open_checkpoint(made.folder).stored == MXFP4
    models = [{"id": THROWAWAY, "path": str(made.folder)}]
    args = {"models": models, "experts": {"actors": 1}}
    http_port, grpc_port = free_ports(2)
    serve.run(build(with_ports(args, http_port, grpc_port)), name=THROWAWAY, route_prefix=None)
    url = f"http://127.0.0.1:{http_port}/v1/completions"
    try:
        wait_until(lambda: len(actor_names(THROWAWAY)) == 1, "its actor is there", BACK_S)
        for prompt in PROMPTS[:3]:
            assert completed(url, prompt, 20) == transformers_tokens(made.oracle, prompt, 20)
        assert actor_names(APP) == main
        with httpx.stream("POST", url, json=ENDLESS, timeout=BACK_S) as response:
            lines = response.iter_lines()
            assert '"error"' not in next(lines)
            asked_s = time.monotonic()
            serve.delete(THROWAWAY)
            ended_s = time.monotonic() - asked_s
            assert "the deployment is being deleted" in "".join(lines)
        print(f"deleted in {ended_s:.1f} s with a request under way")
        assert ended_s < GONE_S
    finally:
        if THROWAWAY in serve.status().applications:
            serve.delete(THROWAWAY)
    wait_until(lambda: not actor_names(THROWAWAY), "its actor is gone", GONE_S)
    assert actor_names(APP) == main
    assert all(is_alive(actor.pid) for actor in told.actors)
    served.wait_whole()
    [reply] = served.client.generate(PROMPTS[0], greedy(20), model=RANDOM)
    assert reply.token_ids == expected_tokens(served)[0][:20]
