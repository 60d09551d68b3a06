"""Says in the output of ``serve run`` when requests are answered, and where to send them.

Serve's command says that an application is deployed before its experts are there, and Ray brings
the lines of our own processes in any order. So a thread of the command asks ``/ready`` itself, and
then each model for a token: only an answer shows that there is a router, too.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml

from router.client import DEFAULT_ADDRESS

POLL_S = 0.5
ASK_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0
LOG_DELAY_S = 1.5
"""Ray brings the lines of other processes about so late; the one that matters is to be the last."""
LONG_S = 60.0
IMPORT_PATH = "router.app:build"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one application of a deployment file is reached from this machine."""

    http_url: str
    grpc_address: str
    models: tuple[str, ...] = ()

    def command(self) -> str:
        """Return a command to try it with."""
        where = "" if self.grpc_address == DEFAULT_ADDRESS else f" --address {self.grpc_address}"
        return f'expertmesh generate "In the beginning" --stream{where}'


def endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    """Return an endpoint for each of our applications in a deployment file."""
    http, grpc = document.get("http_options") or {}, document.get("grpc_options") or {}
    host = str(http.get("host", "127.0.0.1"))
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "https" if http.get("ssl_keyfile") else "http"
    base = f"{scheme}://{host}:{http.get('port', 8000)}{http.get('root_path', '')}"
    return [
        Endpoint(
            base + str(application.get("route_prefix", "/")).rstrip("/"),
            f"{host}:{grpc.get('port', 9000)}",
            tuple(model["id"] for model in application["args"]["models"]),
        )
        for application in document["applications"]
        if application.get("import_path") == IMPORT_PATH
    ]


def announce(file: Path, say: Callable[[str], None]) -> list[threading.Thread]:
    """Tell ``say`` of each application of a checked file once it is ready; returns at once.

    Also told is, once, what is missing after :data:`LONG_S`. The threads end with the process.
    """
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    threads = [
        threading.Thread(target=_tell, args=(endpoint, say), name="announce", daemon=True)
        for endpoint in endpoints(document)
    ]
    for thread in threads:
        thread.start()
    return threads


def _tell(endpoint: Endpoint, say: Callable[[str], None]) -> None:
    started_s, has_warned = time.monotonic(), False
    while (reason := why_not_ready(endpoint)) is not None:
        waited_s = time.monotonic() - started_s
        if waited_s > LONG_S and not has_warned:
            say(f"expertmesh: not ready after {waited_s:.0f} s: {reason}")
            has_warned = True
        time.sleep(POLL_S)
    ready_s = time.monotonic() - started_s
    time.sleep(LOG_DELAY_S)
    say(
        f"expertmesh: ready after {ready_s:.0f} s: HTTP {endpoint.http_url}/v1, "
        f"gRPC {endpoint.grpc_address}; try: {endpoint.command()}"
    )


def why_not_ready(endpoint: Endpoint) -> str | None:
    """Ask once; returns what keeps requests from being answered, ``None`` if nothing."""
    reason = _why_fails(endpoint.http_url, "/ready", ASK_TIMEOUT_S)
    for model in endpoint.models:
        body = {"model": model, "prompt": [0], "max_tokens": 1}
        reason = reason or _why_fails(
            endpoint.http_url, "/v1/completions", ANSWER_TIMEOUT_S, json.dumps(body).encode()
        )
    return reason


def _why_fails(url: str, path: str, timeout_s: float, body: bytes | None = None) -> str | None:
    # Only a status is read, on an address of the operator's own file, whatever its certificate.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    request = Request(url + path, body, {"content-type": "application/json"} if body else {})
    try:
        with urlopen(request, timeout=timeout_s, context=context):
            return None
    except HTTPError as error:
        return _reason(error.read()) or f"HTTP status {error.code}"
    except (OSError, HTTPException) as error:
        return f"{url} does not answer ({error})"


def _reason(body: bytes) -> str:
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    return str(told.get("reason") or "") if isinstance(told, dict) else ""
