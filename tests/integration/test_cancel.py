"""A client that goes away takes its work with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import httpx
import pytest

from tests.cluster_fixture import LAYERS, TINY, TOP_K, ServedCluster, greedy, wait_until

CHOICES, LENGTH = 8, 900
GONE_S = 5.0
END_S = 60.0
"""How long a cancelled request may go on; whole, it would take a multiple of it."""


def leave_grpc(served: ServedCluster) -> None:
    """Start a long stream over gRPC and cancel it after some tokens."""
    sampling = greedy(LENGTH, n=CHOICES)
    stream = served.client.stream("In the beginning", sampling, model=TINY, timeout_s=100)
    for _ in range(3 * CHOICES):
        next(stream)
    assert served.running() == 1
    stream.close()  # type: ignore[attr-defined]


def leave_http(served: ServedCluster) -> None:
    """Start a long stream over HTTP and drop the connection after some tokens."""
    body = {"model": TINY, "prompt": "In the beginning", "max_tokens": LENGTH, "n": CHOICES}
    body |= {"temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.http_url}/v1/completions", json=body) as response:
        events = (line for line in response.iter_lines() if line)
        for _ in range(3 * CHOICES):
            json.loads(next(events).removeprefix("data: "))
        assert served.running() == 1


def leave_unary(served: ServedCluster) -> None:
    """Ask for a long completion over HTTP and give up waiting for it; not as the first request."""
    assert httpx.get(f"{served.http_url}/v1/models").status_code == 200
    body = {"model": TINY, "prompt": "In the beginning", "max_tokens": LENGTH, "n": CHOICES}
    body |= {"temperature": 0, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.http_url}/v1/completions", json=body, timeout=1.0)


@pytest.mark.parametrize("leave", [leave_grpc, leave_http, leave_unary])
def test_a_cancelled_request_frees_the_router(
    served: ServedCluster, leave: Callable[[ServedCluster], None]
) -> None:
    before, pids = served.settled_tokens(), served.pids()
    leave(served)
    # HAProxy tells the gateway of a unary client that left most times, not always; what the gateway
    # then does is tested without it (tests/unit/test_http.py).
    limit_s, share = (END_S, 1.1) if leave is leave_unary else (GONE_S, 0.5)
    wait_until(lambda: served.running() == 0, "the gateway forgot the request", limit_s)
    started_s = time.monotonic()
    [reply] = served.client.generate("In", greedy(5), model=TINY)
    assert len(reply.token_ids) == 5
    assert time.monotonic() - started_s < GONE_S
    computed = served.settled_tokens() - before
    assert 0 < computed < share * CHOICES * LENGTH * TOP_K * LAYERS[TINY]
    assert served.pids() == pids


def test_a_deadline_ends_the_work_too(served: ServedCluster) -> None:
    before = served.settled_tokens()
    body = {"model": TINY, "prompt": "In the beginning", "max_tokens": LENGTH, "n": CHOICES}
    body |= {"temperature": 0, "ignore_eos": True, "timeout_s": 1.0}
    response = httpx.post(f"{served.http_url}/v1/completions", json=body, timeout=20)
    assert response.status_code == 504
    assert response.elapsed.total_seconds() < GONE_S
    assert served.running() == 0
    computed = served.settled_tokens() - before
    assert 0 < computed < CHOICES * LENGTH * TOP_K * LAYERS[TINY] / 2
