"""A router dies with prompts under way: their log probabilities come as without the fault."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from router.client import Client
from tests.cluster_fixture import RANDOM, ServedCluster, StreamReader, greedy, prompt_of
from tests.fault.faults import BEFORE, kill

PROMPTS = [prompt_of(length, length) for length in (40, 97, 130)]
LENGTH = 120
BACK_S = 90.0


@pytest.mark.timeout(300)
def test_log_probabilities_of_prompts_outlive_a_router(served: ServedCluster) -> None:
    told = served.status()
    pids = [one.pid for one in told.routers if any(k.model == RANDOM for k in one.kernels)]
    asked = greedy(LENGTH, prompt_logprobs=2, logprobs=1)
    with Client(served.grpc_address) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        expected = [client.generate(prompt, asked, model=RANDOM)[0] for prompt in PROMPTS]
        streams = [StreamReader(client, prompt, asked, RANDOM, BACK_S) for prompt in PROMPTS]
        answers = [
            pool.submit(client.generate, prompt, asked, model=RANDOM, timeout_s=BACK_S)
            for prompt in PROMPTS
        ]
        for stream in streams:
            stream.wait_tokens(BEFORE)
        kill(told, *pids)
        assert not any(answer.done() for answer in answers)
        for stream, answer, whole in zip(streams, answers, expected, strict=True):
            assert stream.result(BACK_S) == whole.token_ids
            rows = [row for piece in stream.pieces for row in piece.prompt_logprobs]
            assert tuple(rows) == whole.prompt_logprobs
            assert answer.result(BACK_S) == [whole]
    after = served.wait_whole()
    assert pids
    assert not {one.pid for one in after.routers} & {*pids}
