"""A process dies with streams under way: each goes on where it was."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import httpx
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.shipped import free_ports, with_ports
from cluster.reports import ClusterStatus
from router.app import build
from router.client import Client
from tests.cluster_fixture import (
    RANDOM,
    ServedCluster,
    StreamReader,
    greedy,
    wait_until,
)
from tests.fault import faults
from tests.fault.faults import BEFORE, LENGTH, kill

PROMPTS = faults.PROMPTS[:4]
TWIN = "twin"
OPTIONS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "([ab][cd]){200}"}, "ignore_eos": False},
    {
        "structured_outputs": {"regex": "([ab][cd]){200}"},
        "ignore_eos": False,
        "temperature": 1,
        "seed": 5,
    },
    {
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "bad_words": ["the"],
        "temperature": 1,
        "seed": 6,
        "return_routed_experts": True,
    },
]
"""What choices that go on must have too: grammars, rules for single tokens, their experts."""
PAIRS = {"type": "string", "pattern": "^([ab][cd]){300}$"}
CALLING: dict[str, Any] = {
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "jump",
                "parameters": {"type": "object", "properties": {"a": PAIRS}, "required": ["a"]},
            },
        }
    ],
    "tool_choice": "required",
    "ignore_eos": False,
    "temperature": 1,
    "seed": 7,
}
"""A chat request whose answer is a tool call, longer than it may become."""
BACK_S = 90.0
ANSWER_S = 10.0


@dataclass
class HttpStream:
    """One stream of completions over HTTP, or of chat: its tokens and their experts so far."""

    token_ids: list[int] = field(default_factory=list)
    rows: bytes = b""
    finish_reasons: list[str] = field(default_factory=list)
    arguments: str = ""
    """Those of its tool call."""

    def read(
        self, url: str, prompt: list[int], options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, ...]:
        """Read to the end; returns all tokens."""
        body = {
            "model": RANDOM,
            "prompt": prompt,
            "max_tokens": LENGTH,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **options,
        }
        if "messages" in body:
            del body["prompt"]
            url = url.replace("/completions", "/chat/completions")
        with httpx.stream("POST", url, json=body, timeout=BACK_S) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self._take(json.loads(line.removeprefix("data: ")))
        return tuple(self.token_ids)

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            self.token_ids += choice.get("token_ids", ())  # a chat's first chunk has none
            for call in choice.get("delta", {}).get("tool_calls", ()):
                self.arguments += call["function"]["arguments"]
            self.rows += base64.b64decode(choice.get("routed_experts", {}).get("data", ""))
            if choice["finish_reason"] is not None:
                self.finish_reasons.append(choice["finish_reason"])


@contextmanager
def twin_routers(served: ServedCluster) -> Iterator[str]:
    """Deploy a second application with two routers of one model; gives its URL."""
    args = {
        "models": [model for model in served.args["models"] if model["id"] == RANDOM],
        "experts": {"actors": 1},
        "router": {"replicas": 2},
    }
    http_port, grpc_port = free_ports(2)
    serve.run(build(with_ports(args, http_port, grpc_port)), name=TWIN, route_prefix=None)
    try:
        wait_until(lambda: len(twin_status().routers) == 2, "two routers are there", BACK_S)
        yield f"http://127.0.0.1:{http_port}/v1/completions"
    finally:
        serve.delete(TWIN)


def replayed(served: ServedCluster) -> dict[str, Any]:
    """Return options that force experts on the first prompt and the first half of its answer."""
    rows = faults.drawn_experts(served, len(PROMPTS[0]) + LENGTH // 2)
    data = base64.b64encode(rows.tobytes()).decode()
    given = {"data": data, "dtype": "uint8", "shape": list(rows.shape)}
    return {"routed_experts": given, "return_routed_experts": True}


def expected_tokens(served: ServedCluster) -> list[tuple[int, ...]]:
    """Return what transformers makes of :data:`PROMPTS`."""
    return [served.expected(prompt, LENGTH) for prompt in PROMPTS]


def handle(name: str) -> DeploymentHandle:
    return serve.get_deployment_handle(name, TWIN)


def twin_status() -> ClusterStatus:
    status: ClusterStatus = handle("Controller").status.remote().result(timeout_s=ANSWER_S)
    return status


def router_stats() -> dict[str, Any]:
    """Return what one of the routers, whichever Serve picks, tells of itself."""
    stats: dict[str, Any] = (
        handle(f"Router-{RANDOM}").stats.remote().result(timeout_s=ANSWER_S)
    )  # fmt: skip
    return stats


def router_that(is_meant: str) -> dict[str, Any]:
    """Return the stats of a router whose entry ``is_meant`` is not empty."""
    found: dict[str, Any] = wait_until(
        lambda: stats if (stats := router_stats())[is_meant] else {}, f"a router has {is_meant}"
    )
    return found


def test_streams_go_on_at_another_router_when_theirs_is_killed(served: ServedCluster) -> None:
    asked: list[tuple[list[int], Mapping[str, Any]]] = [(prompt, {}) for prompt in PROMPTS]
    every = [CALLING, *OPTIONS, replayed(served)]
    asked += [(PROMPTS[0], options) for options in every]
    whole = f"{served.http_url}/v1/completions"
    expected = expected_tokens(served)
    undisturbed = [HttpStream() for _ in every]
    expected += [
        stream.read(whole, PROMPTS[0], options)
        for stream, options in zip(undisturbed, every, strict=True)
    ]
    assert undisturbed[0].arguments
    assert len(set(expected)) == len(expected)
    with twin_routers(served) as url, ThreadPoolExecutor(len(asked)) as pool:
        told = twin_status()
        router_stats()  # the handle's first call is slow, and streams do not wait for it
        streams = [HttpStream() for _ in asked]
        reading: list[Future[tuple[int, ...]]] = [
            pool.submit(stream.read, url, prompt, options)
            for stream, (prompt, options) in zip(streams, asked, strict=True)
        ]
        wait_until(
            lambda: all(len(stream.token_ids) >= BEFORE for stream in streams), "all have begun"
        )
        victim = router_that("requests")
        assert not any(one.done() for one in reading)
        kill(told, victim["pid"])
        assert [one.result(BACK_S) for one in reading] == expected
        assert streams[len(PROMPTS)].arguments == undisturbed[0].arguments
        assert [stream.finish_reasons for stream in streams] == [["length"]] * len(streams)
        rows = [stream.rows for stream in undisturbed]
        assert [stream.rows for stream in streams[len(PROMPTS) :]] == rows
        assert len({b"", *rows[-2:]}) == 3
        # The fault hit: what the dead one had sent was forced at another.
        survivor = router_that("replayed")
        assert survivor["pid"] != victim["pid"]
        assert survivor["replayed"].keys() == {"equal"}
    served.wait_whole()


def start_own_streams(client: Client) -> list[StreamReader]:
    """Return greedy streams of a client that goes on; they have begun."""
    streams = [StreamReader(client, p, greedy(LENGTH), RANDOM, BACK_S) for p in PROMPTS]
    for stream in streams:
        stream.wait_tokens(BEFORE)
    return streams


def test_our_client_goes_on_when_the_gateway_is_killed(served: ServedCluster) -> None:
    expected, told = expected_tokens(served), served.status()
    with Client(served.grpc_address) as client:
        streams = start_own_streams(client)
        kill(told, *(gateway.pid for gateway in told.gateways))
        assert not any(stream.ended for stream in streams)
        assert [stream.result(BACK_S) for stream in streams] == expected
    after = served.wait_whole()
    assert not {one.pid for one in after.gateways} & {one.pid for one in told.gateways}
    assert after.routers == told.routers
