"""A client that goes away takes its work with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest

from tests.cluster_fixture import LAYERS, TINY, TOP_K, ServedCluster, greedy, wait_until

CHOICES, LENGTH = 16, 900
WHOLE = CHOICES * (LENGTH - 1) * TOP_K * LAYERS[TINY]
"""Fewer rows of experts than the whole answer needs."""
GONE_S = 60.0


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
    """Ask for a long completion over HTTP, its body long after its head, and give up waiting."""
    document = {"model": TINY, "prompt": "In the beginning", "max_tokens": LENGTH, "n": CHOICES}
    body = json.dumps(document | {"temperature": 0, "ignore_eos": True}).encode()

    def late_body() -> Iterator[bytes]:
        # An answer to another request shows that the gateway has had the head.
        assert httpx.get(f"{served.http_url}/v1/models").status_code == 200
        yield body

    address = urlsplit(served.http_url)
    with closing(HTTPConnection(address.hostname, address.port, timeout=GONE_S)) as connection:
        headers = {"content-length": str(len(body)), "content-type": "application/json"}
        connection.request("POST", "/v1/completions", late_body(), headers)
        wait_until(lambda: served.running() == 1, "the gateway has the request", GONE_S)


@pytest.mark.parametrize("leave", [leave_grpc, leave_http, leave_unary])
def test_a_cancelled_request_frees_the_router(
    served: ServedCluster, leave: Callable[[ServedCluster], None]
) -> None:
    before, pids = served.settled_tokens(), served.pids()
    leave(served)
    wait_until(lambda: served.running() == 0, "the gateway forgot the request", GONE_S)
    [reply] = served.client.generate("In", greedy(5), model=TINY)
    assert len(reply.token_ids) == 5
    assert 0 < served.settled_tokens() - before < WHOLE
    assert served.pids() == pids


def test_a_deadline_ends_the_work_too(served: ServedCluster) -> None:
    """The first deadline, ever longer ones, by which the request has begun on this machine."""
    body = {"model": TINY, "prompt": "In the beginning", "max_tokens": LENGTH, "n": CHOICES}
    body |= {"temperature": 0, "ignore_eos": True, "timeout_s": 0.05}
    computed = 0
    while not computed:
        before, body["timeout_s"] = served.settled_tokens(), 2 * body["timeout_s"]
        response = httpx.post(f"{served.http_url}/v1/completions", json=body, timeout=GONE_S)
        assert response.status_code == 504
        wait_until(lambda: served.running() == 0, "the gateway forgot the request", GONE_S)
        computed = served.settled_tokens() - before
    assert computed < WHOLE
