"""The line in which ``serve run`` says that requests are answered, and where to send them.

Serve's command says that an application is deployed before its experts are loaded, and Ray prints
the lines of our processes in any order. So a thread of the command asks ``/ready``, and then each
language model for a token and each mixture for a prediction: only an answer shows that there is a
router, too.
"""

from __future__ import annotations

import atexit
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from math import prod
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.errors import ExpertMeshError
from cluster.reports import LoadingStatus, loading_line
from router.client import DEFAULT_ADDRESS, Client
from router.client.access import API_KEY_VARIABLE
from router.client.tls import CERTIFICATE_VARIABLE, KEY_VARIABLE
from router.config.deployment import IMPORT_PATH
from router.config.listen import ListenConfig
from router.messages.prediction import MIXTURE_PLATFORM
from router.ops.doctor.ports import listens_of

POLL_S = 0.5
ASK_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0
LOG_DELAY_S = 1.5
"""Ray prints the lines of other processes so much later; the address is to be the last line."""
LONG_S = 60.0
PROMPT, PROMPTS = "The capital of France is", {"mesh-tiny": "And the LORD said"}
"""What is proposed to try; by model where one knows little."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The addresses of one application of a deployment file, as seen from this machine."""

    http_url: str
    grpc_address: str
    models: tuple[str, ...] = ()
    admin_address: str | None = None
    has_keys: bool = False

    def command(self) -> str:
        """Return a command that tries the endpoint."""
        has_tls = self.http_url.startswith("https")
        asks = bool(self.models) and not self.has_keys
        if asks and all(_mixture(self.http_url, model) for model in self.models):
            trust = " --cacert FILE" if has_tls else ""
            return f"curl{trust} {self.http_url}{_path_of(self.models[0])}"
        trust = " --tls-ca FILE" if has_tls else ""
        where = "" if self.grpc_address == DEFAULT_ADDRESS else f" --address {self.grpc_address}"
        where += " --api-key-file FILE" if self.has_keys else ""
        prompt = PROMPTS.get(self.models[0], PROMPT) if self.models else PROMPT
        return f'expertmesh{trust} generate "{prompt}" --temperature 0 --stream{where}'


def endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    """Return an endpoint for each of our applications in a deployment file."""
    applications = [
        app for app in document["applications"] if app.get("import_path") == IMPORT_PATH
    ]
    return [
        _endpoint(application, listen)
        for application, listen in zip(applications, listens_of(document), strict=True)
    ]


def _endpoint(application: Mapping[str, Any], listen: ListenConfig) -> Endpoint:
    host, scheme = _own(listen.host), "http" if listen.tls is None else "https"
    return Endpoint(
        f"{scheme}://{host}:{listen.http_port}",
        f"{host}:{listen.grpc_port}",
        tuple(model["id"] for model in application["args"]["models"]),
        f"{_own(listen.admin_host)}:{listen.admin_port}",
        bool((application["args"].get("security") or {}).get("keys_file")),
    )


def _own(host: str) -> str:
    """Return where this machine reaches what listens on a host."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


@dataclass(frozen=True, slots=True)
class Start:
    """A start of an application: when its command began, by the monotonic clock, and its end."""

    began_at_s: float
    is_ready: threading.Event


def announce(
    document: Mapping[str, Any],
    say: Callable[[str], None],
    began_at_s: float,
    console: Console | None = None,
) -> list[Start]:
    """Call ``say`` with a line for each application of a checked, completed file once it is ready.

    Returns at once. After :data:`LONG_S`, one more line says why an application is not ready. A
    ``console`` at a terminal shows a bar while actors load; elsewhere the controller logs their
    progress. The threads end with the process.
    """
    starts = []
    for endpoint in endpoints(document):
        start = Start(began_at_s, threading.Event())
        arguments = (endpoint, say, start, console)
        threading.Thread(target=_announce_one, args=arguments, name="announce", daemon=True).start()
        starts.append(start)
    return starts


def _announce_one(
    endpoint: Endpoint, say: Callable[[str], None], start: Start, console: Console | None
) -> None:
    has_warned = False
    with LoadingBar(console) as bar:
        while (reason := why_not_ready(endpoint)) is not None:
            waited_s = time.monotonic() - start.began_at_s
            if waited_s > LONG_S and not has_warned:
                say(f"expertmesh: not ready after {waited_s:.0f} s: {reason}")
                has_warned = True
            if bar.is_shown:
                bar.show(_loading(endpoint))
            time.sleep(POLL_S)
    start.is_ready.set()
    ready_s = time.monotonic() - start.began_at_s
    time.sleep(LOG_DELAY_S)
    say(
        f"expertmesh: ready after {ready_s:.0f} s: HTTP {endpoint.http_url}/v1, "
        f"gRPC {endpoint.grpc_address}; try: {endpoint.command()}"
    )


class LoadingBar:
    """A bar at the foot of a terminal while actors load; other lines go above it."""

    def __init__(self, console: Console | None) -> None:
        """Show nothing yet. Without a ``console`` at a terminal, the bar is never shown."""
        self.is_shown = console is not None and console.is_terminal
        self._progress = Progress(
            TextColumn("expertmesh: loading"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> LoadingBar:
        """Return the bar."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove the bar."""
        self._progress.stop()

    def show(self, loading: Sequence[LoadingStatus]) -> None:
        """Show the progress of all loading actors together; shows nothing where none loads."""
        if not loading:
            return
        if self._task is None:
            atexit.register(self._progress.stop)  # or Ctrl-C would leave a terminal without cursor
            self._progress.start()
            self._task = self._progress.add_task("")
        self._progress.update(
            self._task,
            total=sum(actor.num_experts for actor in loading),
            completed=sum(actor.held_experts for actor in loading),
            description=loading_line(loading),
        )


def _loading(endpoint: Endpoint) -> Sequence[LoadingStatus]:
    """Return the loading actors, by a gateway's status; none while no gateway answers.

    Where there are keys, it is the one in ``EXPERTMESH_API_KEY`` that is shown, and none is asked
    without it.
    """
    if endpoint.has_keys and not os.environ.get(API_KEY_VARIABLE):
        return ()
    try:
        with Client(
            endpoint.grpc_address, retry=None, admin_address=endpoint.admin_address
        ) as client:
            return client.status().loading
    except ExpertMeshError:
        return ()


def why_not_ready(endpoint: Endpoint) -> str | None:
    """Ask once; returns why requests are not answered, or ``None`` where they are.

    Where clients need a key only ``/ready`` is asked: a request without one would be an alarm.
    """
    reason = _why_fails(endpoint.http_url, "/ready", ASK_TIMEOUT_S)
    for model in () if endpoint.has_keys else endpoint.models:
        reason = reason or _why_no_answer(endpoint.http_url, model)
    return reason


def _why_no_answer(url: str, model: str) -> str | None:
    path, body = "/v1/completions", {"model": model, "prompt": [0], "max_tokens": 1}
    mixture = _mixture(url, model)
    if mixture is not None:
        path, body = f"{_path_of(model)}/infer", {"inputs": [_zeros(i) for i in mixture["inputs"]]}
    return _why_fails(url, path, ANSWER_TIMEOUT_S, json.dumps(body).encode())


def _path_of(model: str) -> str:
    return f"/v2/models/{quote(model)}"


def _mixture(url: str, model: str) -> dict[str, Any] | None:
    """Return the metadata of a mixture; ``None`` for a language model, or without an answer."""
    try:
        with _opened(url, _path_of(model), ASK_TIMEOUT_S) as answer:
            metadata: dict[str, Any] = json.load(answer)
            return metadata if metadata.get("platform") == MIXTURE_PLATFORM else None
    except (OSError, HTTPException, ValueError):
        return None


def _zeros(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an input of one row of zeros."""
    shape = [1 if axis == -1 else axis for axis in given["shape"]]
    data = [0] * prod(shape)
    return {"name": given["name"], "datatype": given["datatype"], "shape": shape, "data": data}


def _opened(url: str, path: str, timeout_s: float, body: bytes | None = None) -> Any:
    # No secret is sent, to an address of the operator's own file, whatever its certificate.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    certificate = os.environ.get(CERTIFICATE_VARIABLE)
    if context is not None and certificate:
        context.load_cert_chain(certificate, os.environ.get(KEY_VARIABLE) or None, password="")
    request = Request(url + path, body, {"content-type": "application/json"} if body else {})
    return urlopen(request, timeout=timeout_s, context=context)


def _why_fails(url: str, path: str, timeout_s: float, body: bytes | None = None) -> str | None:
    try:
        with _opened(url, path, timeout_s, body):
            return None
    except HTTPError as error:
        return _reason(error.read()) or f"HTTP status {error.code}"
    except (OSError, HTTPException) as error:
        if "CERTIFICATE_REQUIRED" in str(error):
            return (
                f"{url} asks clients for a certificate: name one in {CERTIFICATE_VARIABLE}, and in "
                f"{KEY_VARIABLE} its key"
            )
        return f"{url} does not answer ({error})"


def _reason(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    return str(answer.get("reason") or "") if isinstance(answer, dict) else ""
