"""Requests with little time beside a patient one, on a real deployment."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import DeadlineExceededError
from tests.cluster_fixture import RANDOM, ServedCluster, greedy
from tests.fault.faults import PROMPTS

PERIOD_S = 0.05
"""Twenty requests a second."""
LENGTH = 100
SHORT_S, PATIENT_S = 0.25, 60.0


def neighbour_s(served: ServedCluster, timeout_s: float) -> tuple[float, int]:
    """Return how long a request takes beside others of ``timeout_s``, and how many were late."""
    expected = served.expected(PROMPTS[0], LENGTH)
    ended = threading.Event()
    late = 0

    def ask(number: int) -> None:
        nonlocal late
        prompt = PROMPTS[number % len(PROMPTS)]
        try:
            served.client.generate(prompt, greedy(LENGTH), model=RANDOM, timeout_s=timeout_s)
        except DeadlineExceededError:
            late += 1

    def send() -> None:
        for number in itertools.count():
            if ended.wait(PERIOD_S):
                return
            pool.submit(ask, number)

    with ThreadPoolExecutor(64) as pool:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        ended.wait(1.0)  # until the others are there
        started_s = time.monotonic()
        [reply] = served.client.generate(PROMPTS[0], greedy(LENGTH), model=RANDOM, timeout_s=60)
        took_s = time.monotonic() - started_s
        ended.set()
        sender.join(10)
        pool.shutdown(cancel_futures=True)
    assert reply.token_ids == expected
    return took_s, late


def test_requests_with_little_time_do_not_slow_a_neighbour_down(served: ServedCluster) -> None:
    patient_s, _ = neighbour_s(served, PATIENT_S)
    short_s, late = neighbour_s(served, SHORT_S)
    print(f"{short_s:.1f} s beside requests of {SHORT_S} s, {patient_s:.1f} s beside patient ones")
    assert late > 10  # the fault has hit
    assert short_s <= 1.5 * patient_s
