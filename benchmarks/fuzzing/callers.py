"""Targets: what a caller says of itself, in the headers of HTTP and the metadata of gRPC.

An input is lines ``name: value``, before them the method and the path of HTTP. Whatever it is, a
caller without the right key, and a web page of another site, get nothing but a typed refusal.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import yaml
from starlette.types import Message, Receive, Scope, Send

from benchmarks.fuzzing.target import Target
from router.gateway.grpc.call import Method
from router.gateway.http_io import OPEN_PATHS, BrowserRules, EdgeMiddleware
from router.gateway.limits.charges import Charges
from router.gateway.listen.grpc import Door
from router.gateway.metrics import Metrics
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, error_from_grpc
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.security.keys import Caller, Role

KEY, OTHER_KEY = "em-the-right-one", "em-for-metrics"
HOST, ORIGIN = "mesh.lan", "https://page.example"
"""The name and the origin that the rules allow, beside this machine's."""
RIGHT = f"Bearer {KEY}"
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?")
"""A host as browsers send it."""
_OWN_NAME = re.compile(r"(.*\.)?localhost|[\d.]+|mesh\.lan")
_REFUSED = (400, 401, 403, 415)
_METHOD = "/any/method"
Lines = Sequence[tuple[bytes, bytes]]


def access() -> Access:
    """Return the check of a file with a key for inference, and one for metrics."""
    roles = {KEY: Role.INFERENCE, OTHER_KEY: Role.METRICS}
    entries = [
        {"sha256": sha256(key.encode()).hexdigest(), "name": str(role), "roles": [str(role)]}
        for key, role in roles.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump({"keys": entries}))
        return Access(Keyring(file), lambda surface, reason: None, slow_s=0.0)


def http() -> Target:
    """Return the target of HTTP's headers: ``Authorization``, ``Host``, ``Origin``, and others."""
    reached: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    rules = BrowserRules(is_local=True, hosts=[HOST], origins=[ORIGIN])
    edge = EdgeMiddleware(app, rules, access(), Charges(Metrics()))

    def run(data: bytes) -> None:
        reached.clear()
        method, path, headers = _request_of(data)
        scope: Scope = {"type": "http", "method": method, "path": path, "headers": headers}
        sent = asyncio.run(_answer(edge, scope))
        given = [value.decode("latin-1") for name, value in headers if name == FIELD.encode()]
        if not reached:
            body = _body_of_refusal(sent)
            assert sent[0]["status"] != 401 or given != [RIGHT], "refused the right key"
            others = [path.encode(), *(value for name, value in headers if name != FIELD.encode())]
            if not any(KEY.encode() in value for value in others):  # a wrong host is shown
                assert KEY.encode() not in body, "a refusal tells a key"
            return
        caller = scope["state"]["caller"]
        assert caller is None if not given else is_right(given, path), "let in without a key"
        assert caller is not None or path in OPEN_PATHS, "a path that needs a key"
        assert not is_of_other_site(headers), "let in a page of another site"

    return Target(_HTTP_SEEDS, run)


async def _answer(edge: EdgeMiddleware, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await edge(scope, receive, send)
    return sent


def _body_of_refusal(sent: Sequence[Message]) -> bytes:
    """Check that HTTP refused by a typed error; returns what it tells."""
    start, body = sent
    assert start["status"] in _REFUSED, f"refused by {start['status']}"
    assert json.loads(body["body"])["error"]
    return bytes(body["body"])


def is_right(given: Sequence[str], path: str) -> bool:
    """Return whether ``Authorization`` is once there, and has a key that the path takes."""
    keys = (KEY, OTHER_KEY) if path in OPEN_PATHS else ({"/metrics": OTHER_KEY}.get(path, KEY),)
    words = given[0].split() if len(given) == 1 else []
    return len(words) == 2 and words[0].lower() == "bearer" and words[1] in keys


def is_of_other_site(headers: Lines) -> bool:
    """Return whether a browser sent it for another site: by its ``Host``, or its ``Origin``."""
    first = {name: value.decode("latin-1").lower() for name, value in reversed(headers)}
    host, origin = first.get(b"host", ""), first.get(b"origin", "")
    if _NAME.fullmatch(host) and not _OWN_NAME.fullmatch(host.partition(":")[0]):
        return True
    scheme, _, page = origin.partition("://")
    is_page = scheme in ("http", "https") and _NAME.fullmatch(page) is not None
    return is_page and page != host and origin != ORIGIN


def metadata() -> Target:
    """Return the target of gRPC's metadata, as grpcio gives it: texts, and bytes of ``-bin``."""
    reached: list[Caller | None] = []

    async def answer(request: bytes, caller: Caller | None, context: Any) -> Any:
        reached.append(caller)
        return inference_pb2.GetModelInfoReply()

    door = Door(access(), {_METHOD: Method(Role.INFERENCE, answer)}, 1 << 20)

    def run(data: bytes) -> None:
        given = list(_metadata_of(data))
        reached.clear()
        context = _Context()
        asyncio.run(_call(door, given, context))
        values = [value for name, value in given if name == FIELD]
        if reached:
            texts = [value if isinstance(value, str) else "" for value in values]
            assert is_right(texts, ""), "let in without a key"
            assert context.code is None, "an answer with an error"
            return
        assert values != [RIGHT], "refused the right key"
        assert context.code in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        ), f"refused by {context.code}"
        error = error_from_grpc(context.code, context.details, context.trailing[DETAILS_KEY])
        assert error.message
        assert KEY not in str(error), "a refusal tells a key"

    return Target(_GRPC_SEEDS, run)


async def _call(door: Door, given: Sequence[tuple[str, str | bytes]], context: _Context) -> None:
    """Call the door's one method with this metadata, as grpcio does."""

    async def no_method(details: Any) -> None:
        raise AssertionError("a method was passed on")

    call: Any = SimpleNamespace(method=_METHOD, invocation_metadata=given)
    handler: Any = await door.intercept_service(no_method, call)
    with suppress(_AbortedError):
        await handler.stream_unary(None, context)


class _AbortedError(Exception):
    """What ends a call that a gateway aborts."""


class _Context:
    """A call's context: keeps what the call is ended by."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, Any] = {}

    async def read(self) -> bytes:
        return b""

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: Iterable[tuple[str, Any]]
    ) -> None:
        self.code, self.details, self.trailing = code, details, dict(trailing_metadata)
        raise _AbortedError


def _request_of(data: bytes) -> tuple[str, str, list[tuple[bytes, bytes]]]:
    """Return method, path and headers of lines, as a server of HTTP hands them on."""
    first, *lines = data.split(b"\n")
    method, _, path = first.decode("latin-1").partition(" ")
    return method, path, list(_headers_of(lines))


def _headers_of(lines: Iterable[bytes]) -> Iterable[tuple[bytes, bytes]]:
    for line in lines:
        name, _, value = line.partition(b":")
        yield name.strip().lower(), value.strip(b" \t")


def _metadata_of(data: bytes) -> Iterable[tuple[str, str | bytes]]:
    for name, value in _headers_of(data.split(b"\n")):
        key = name.decode("latin-1")
        yield key, value if key.endswith("-bin") or not value.isascii() else value.decode()


_KEYS = (
    f"authorization: {RIGHT}",
    f"Authorization: bearer   {KEY} ",
    f"authorization: Bearer {OTHER_KEY}",
    f"authorization: {RIGHT}\nauthorization: {RIGHT}",
    f"authorization: Basic {KEY}",
    f"authorization-bin: {RIGHT}",
    f"x-api-key: {KEY}",
    "authorization: Bearer em-wrong",
    "authorization:",
)
_PLACES = (
    "host: localhost:8000",
    f"host: {HOST}",
    "host: evil.example:8000",
    "host: [::1]:8000\norigin: http://[::1]:8000",
    "host: 127.0.0.1\norigin: https://evil.example",
    f"host: a.localhost\norigin: {ORIGIN}",
    "host: localhost\norigin: null",
)
_FIRST = (
    "GET /v1/models",
    "GET /metrics",
    "GET /ready",
    "POST /v1/completions",
    "POST /v2/models/m/infer",
)
_TYPES = ("content-type: application/json", "content-type: text/plain; charset=utf-8")
_GRPC_SEEDS = [f"user-agent: x\n{keys}".encode() for keys in _KEYS]
_HTTP_SEEDS = [
    f"{_FIRST[i % len(_FIRST)]}\n{place}\n{_TYPES[i % 2]}\n{keys}".encode()
    for i, (keys, place) in enumerate((keys, place) for keys in _KEYS for place in _PLACES)
]
