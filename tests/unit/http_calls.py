"""Calls of the HTTP app over a scripted upstream, and checks that every reply must pass."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from router.config.deployment import GatewayConfig
from tests.unit.gateway_fakes import FakeUpstream, http_app

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OF_JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "in the"}]


@contextmanager
def http_server(app: FastAPI, send_bytes: int | None = None) -> Iterator[int]:
    """Run an app behind a real server on a loopback port, in a thread; gives its port.

    ``send_bytes`` is the size of its sockets' send buffers.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if send_bytes is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.force_exit = server.should_exit = True
            thread.join(20)


def call(
    upstream: FakeUpstream,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    limits: GatewayConfig | None = None,
) -> httpx.Response:
    """One request to a fresh app; ``body`` is JSON, or raw bytes."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(http_app(upstream, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            if body is None:
                return await client.get(path, headers=headers)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers=OF_JSON | (headers or {}))

    async def bounded() -> httpx.Response:
        return await asyncio.wait_for(send(), 20)

    return asyncio.run(bounded())


def events(response: httpx.Response) -> list[Any]:
    """The events of an SSE reply, after checking its frame."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def completion(upstream: FakeUpstream, **body: Any) -> httpx.Response:
    return call(upstream, COMPLETIONS, {"model": "tiny", "prompt": "in the", **body})


def chat(upstream: FakeUpstream, **body: Any) -> httpx.Response:
    return call(upstream, CHAT, {"model": "tiny", "messages": HELLO, **body})


def refusal(response: httpx.Response, status: int, param: str | None) -> str:
    """Check an error's shape; returns its message."""
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    return str(error["message"])
