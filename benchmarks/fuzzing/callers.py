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
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import yaml
from starlette.types import Message, Receive, Scope, Send

from benchmarks.fuzzing.target import Target
from router.gateway.browsers import BrowserRules
from router.gateway.grpc.service import GrpcMethods
from router.gateway.http_io import OPEN_PATHS, EdgeMiddleware
from router.protos import inference_pb2
from router.protos.errors import DETAILS_KEY, error_from_grpc
from router.security.access import FIELD, Access
from router.security.keyring import Keyring
from router.security.keys import Role

KEY, OTHER_KEY = "em-the-right-one", "em-for-metrics"
HOST, ORIGIN = "mesh.lan", "https://page.example"
"""The name and the origin that the rules allow, beside this machine's."""
RIGHT = f"Bearer {KEY}"
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?")
"""A host as browsers send it."""
_OWN_NAME = re.compile(r"(.*\.)?localhost|[\d.]+|mesh\.lan")
_REFUSED = (400, 401, 403, 415)
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
    edge = EdgeMiddleware(app, True, rules, access(), lambda caller: {})

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
    methods = _Methods(access())

    def run(data: bytes) -> None:
        context = _Context(list(_metadata_of(data)))
        methods.reached = 0
        asyncio.run(methods.GetModelInfo(b"", context))
        given = [value for name, value in context.given if name == FIELD]
        if methods.reached:
            texts = [value if isinstance(value, str) else "" for value in given]
            assert is_right(texts, ""), "let in without a key"
            assert context.code is None, "an answer with an error"
            return
        assert given != [RIGHT], "refused the right key"
        assert context.code in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        ), f"refused by {context.code}"
        error = error_from_grpc(context.code, context.details, context.trailing[DETAILS_KEY])
        assert error.message
        assert KEY not in str(error), "a refusal tells a key"

    return Target(_GRPC_SEEDS, run)


class _Methods(GrpcMethods):
    """The methods of a gateway; counts the calls that get past the check."""

    def __init__(self, check: Access) -> None:
        self.access = check
        handlers: Any = self
        self.grpc_handlers = handlers
        self.reached = 0

    async def get_model_info(self, data: bytes) -> Any:
        self.reached += 1
        return inference_pb2.GetModelInfoReply()


class _Context:
    """A call's context: what came, and what is answered."""

    def __init__(self, given: list[tuple[str, str | bytes]]) -> None:
        self.given = given
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, Any] = {}

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self.given

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = dict(trailing_metadata)


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
