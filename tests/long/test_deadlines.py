"""Requests with little time beside a patient one, on a real deployment of emulated devices.

A step of these devices takes about 0.1 s, so that in nearly each one some request's time ends.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from ray import serve

from benchmarks.shipped import free_ports, with_ports
from router.app import build
from tests.cluster_fixture import RANDOM, ServedCluster, wait_until
from tests.fault.faults import PROMPTS

EMULATED = "emulated"
DEVICES = 2
BATCH_S = 0.008
"""Seconds of an expert: a device has up to four in a layer, and the model three layers."""
PERIOD_S = 0.05
"""Twenty requests a second."""
TOKENS, OTHERS_TOKENS = 24, 8
LEAD_S = 1.0
"""How long the other requests come before the neighbour does."""
SHORT_S, PATIENT_S = 0.25, 20.0
BACK_S = 60.0


@contextmanager
def emulated_devices(served: ServedCluster) -> Iterator[str]:
    """Deploy a second application, on emulated devices; gives the URL of its completions."""
    args = {
        "models": [model for model in served.args["models"] if model["id"] == RANDOM],
        "experts": {"actors": DEVICES, "emulate": {"batch_s": BATCH_S}},
    }
    http_port, grpc_port = free_ports(2)
    serve.run(build(with_ports(args, http_port, grpc_port)), name=EMULATED, route_prefix=None)
    url = f"http://127.0.0.1:{http_port}/v1/completions"
    try:
        wait_until(lambda: complete(url, PROMPTS[0], 1, PATIENT_S).is_success, "it answers", BACK_S)
        yield url
    finally:
        serve.delete(EMULATED)
        served.wait_whole()


def complete(url: str, prompt: list[int], tokens: int, timeout_s: float) -> httpx.Response:
    """Return the answer to a greedy request of so many tokens, whatever its status is."""
    body = {
        "model": RANDOM,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "timeout_s": timeout_s,
    }
    return httpx.post(url, json=body, timeout=BACK_S)


def token_ids(answer: httpx.Response) -> list[int]:
    """Return the tokens of an answer, which must be one."""
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    ids: list[int] = choice["token_ids"]
    return ids


def neighbour(url: str, others_timeout_s: float) -> tuple[float, list[int], Counter[int]]:
    """Ask beside twenty requests a second.

    Returns how long the answer takes, its tokens, and the statuses of the others' answers.
    """
    ended = threading.Event()
    statuses: Counter[int] = Counter()

    def ask(number: int) -> int:
        prompt = PROMPTS[number % len(PROMPTS)]
        return complete(url, prompt, OTHERS_TOKENS, others_timeout_s).status_code

    def send() -> None:
        asked = []
        for number in itertools.count():
            if ended.wait(PERIOD_S):
                break
            asked.append(pool.submit(ask, number))
        statuses.update(status.result() for status in asked)

    with ThreadPoolExecutor(64) as pool:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        ended.wait(LEAD_S)
        started_s = time.monotonic()
        answer = complete(url, PROMPTS[0], TOKENS, PATIENT_S)
        took_s = time.monotonic() - started_s
        ended.set()
        sender.join(BACK_S)
    return took_s, token_ids(answer), statuses


@pytest.mark.timeout(180)
def test_requests_with_little_time_do_not_slow_a_neighbour_down(served: ServedCluster) -> None:
    with emulated_devices(served) as url:
        alone = token_ids(complete(url, PROMPTS[0], TOKENS, PATIENT_S))
        patient_s, beside_patient, answered = neighbour(url, PATIENT_S)
        short_s, beside_short, hurried = neighbour(url, SHORT_S)
    print(f"{patient_s:.2f} s beside patient requests, of which {answered} ended so")
    print(f"{short_s:.2f} s beside requests of {SHORT_S} s, of which {hurried} ended so")
    assert beside_patient == beside_short == alone
    assert answered.keys() == {200}
    assert answered.total() > 30
    assert patient_s > 0.05 * TOKENS  # a step takes long enough for the fault to show
    assert hurried[504] > 30  # the fault has hit
    assert hurried.keys() <= {200, 504}
    assert short_s <= 1.5 * patient_s
