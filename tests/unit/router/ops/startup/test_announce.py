"""What ``serve run`` says when requests are answered."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.reports import LoadingStatus
from router.messages.prediction import MIXTURE_PLATFORM
from router.ops.startup import announce
from router.ops.startup.announce import Endpoint, LoadingBar, endpoints, why_not_ready
from router.security.certificates import Certificates
from router.serve.options import completed
from tests.client_tls import Pair

DEPLOY = Path(__file__).parents[5] / "deploy"
LIMIT_S = 60.0


def document(**listen: Any) -> dict[str, Any]:
    """Return the deployment file, completed, with these keys of ``gateway.listen``."""
    told = completed(yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8")))
    told["applications"][0]["args"]["gateway"]["listen"] = listen
    return told


class Gateway:
    """A server that answers ``/ready`` by what ``answers`` has next, and then by the last of it.

    Completions are answered by what ``completions`` has, in the same way.
    """

    def __init__(self, answers: list[tuple[int, bytes]]) -> None:
        self.answers = answers
        self.completions: list[tuple[int, bytes]] = [(200, b"{}")]
        self.metadata: dict[str, tuple[int, bytes]] = {}
        self.paths: list[str] = []
        self.asked: list[dict[str, Any]] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/v2/"):
                    self.reply([gateway.metadata.get(self.path, (404, b"{}"))])
                else:
                    self.reply(gateway.answers)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                gateway.asked.append(json.loads(body))
                self.reply(gateway.completions)

            def reply(self, left: list[tuple[int, bytes]]) -> None:
                gateway.paths.append(self.path)
                status, body = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serving() -> Iterator[list[Gateway]]:
    """A list whose servers are closed in the end."""
    gateways: list[Gateway] = []
    yield gateways
    for gateway in gateways:
        gateway.server.shutdown()
        gateway.server.server_close()


def missing(count: int) -> tuple[int, bytes]:
    return 503, json.dumps(
        {"ready": False, "reason": f"{count} experts have no live copy"}
    ).encode()


def test_the_shipped_file_is_reached_at_the_default_addresses() -> None:
    [endpoint] = endpoints(document())
    assert endpoint == Endpoint(
        "http://127.0.0.1:8000", "127.0.0.1:9000", ("mesh-tiny",), "127.0.0.1:9001"
    )
    assert endpoint.command() == 'expertmesh generate "In the beginning" --stream'


def test_other_addresses_are_told_as_this_machine_reaches_them() -> None:
    told = document(
        host="0.0.0.0",
        http_port=81,
        grpc_port=91,
        admin_host="10.1.2.3",
        tls={"certificate": "c", "key": "k"},
    )
    told["applications"].append({"name": "other", "import_path": "other:app"})
    [endpoint] = endpoints(told)
    assert endpoint == Endpoint(
        "https://127.0.0.1:81", "127.0.0.1:91", ("mesh-tiny",), "10.1.2.3:9001"
    )
    assert endpoint.command().endswith(" --address 127.0.0.1:91")
    assert endpoint.command().startswith("expertmesh --tls-ca FILE generate ")


def test_each_application_of_ours_has_an_endpoint() -> None:
    told = document()
    args = {"models": [{"id": "a"}, {"id": "b"}], "gateway": {"listen": {"http_port": 82}}}
    told["applications"].append({"import_path": "router.app:build", "args": args})
    shipped, other = endpoints(told)
    assert (shipped.http_url, shipped.models) == ("http://127.0.0.1:8000", ("mesh-tiny",))
    assert (other.http_url, other.models) == ("http://127.0.0.1:82", ("a", "b"))
    assert endpoints({"applications": []}) == []


def test_a_server_that_asks_for_a_certificate_gets_the_one_of_the_environment(
    serving: list[Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path / "tls", asks_clients=True)
    gateway = Gateway([(200, b"{}")])
    serving.append(gateway)
    context = Certificates(pair.files).current().context
    gateway.server.socket = context.wrap_socket(gateway.server.socket, server_side=True)
    endpoint = Endpoint(f"https://127.0.0.1:{gateway.port}", "")
    wanted = "asks clients for a certificate: name one in EXPERTMESH_TLS_CERT"

    def is_told() -> bool:
        reason = why_not_ready(endpoint)
        assert reason
        return wanted in reason

    # The end of the connection may come before its reason, on a busy machine often.
    until_s = time.monotonic() + LIMIT_S
    while not is_told():
        assert time.monotonic() < until_s
    monkeypatch.setenv("EXPERTMESH_TLS_CERT", pair.client)
    monkeypatch.setenv("EXPERTMESH_TLS_KEY", pair.client_key)
    assert why_not_ready(endpoint) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, b"{}"), None),
        (missing(3), "3 experts have no live copy"),
        ((404, b"Path '/ready' not found."), "HTTP status 404"),
        ((503, b"[1]"), "HTTP status 503"),
        ((503, b'{"reason": null}'), "HTTP status 503"),
    ],
)
def test_what_ready_answers_is_read(
    serving: list[Gateway], answer: tuple[int, bytes], reason: str | None
) -> None:
    serving.append(Gateway([answer]))
    assert why_not_ready(Endpoint(f"http://127.0.0.1:{serving[0].port}", "")) == reason
    assert serving[0].paths == ["/ready"]


def test_each_model_must_answer_too(serving: list[Gateway]) -> None:
    serving.append(Gateway([(200, b"{}")]))
    [gateway] = serving
    endpoint = Endpoint(f"http://127.0.0.1:{gateway.port}", "", ("a", "b"))
    assert why_not_ready(endpoint) is None
    completions = "/v1/completions"
    assert gateway.paths == ["/ready", "/v2/models/a", completions, "/v2/models/b", completions]
    assert [one["model"] for one in gateway.asked] == ["a", "b"]
    assert all(one["max_tokens"] == 1 for one in gateway.asked)
    gateway.completions = [(200, b"{}"), (503, b"{}")]
    assert why_not_ready(endpoint) == "HTTP status 503"


def test_a_mixture_must_predict(serving: list[Gateway]) -> None:
    serving.append(Gateway([(200, b"{}")]))
    [gateway] = serving
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [-1, -1, 3]},
        {"name": "k", "datatype": "INT64", "shape": [-1, 1]},
    ]
    metadata = {"platform": MIXTURE_PLATFORM, "inputs": inputs}
    gateway.metadata["/v2/models/digits"] = 200, json.dumps(metadata).encode()
    endpoint = Endpoint(f"http://127.0.0.1:{gateway.port}", "", ("digits",))
    assert why_not_ready(endpoint) is None
    assert gateway.paths[-1] == "/v2/models/digits/infer"
    [asked] = gateway.asked
    assert asked["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [1, 1, 3], "data": [0, 0, 0]},
        {"name": "k", "datatype": "INT64", "shape": [1, 1], "data": [0]},
    ]
    assert endpoint.command() == f"curl http://127.0.0.1:{gateway.port}/v2/models/digits"
    gateway.completions = [(503, b"{}")]
    assert why_not_ready(endpoint) == "HTTP status 503"


def test_nobody_there_is_a_reason_too(serving: list[Gateway]) -> None:
    serving.append(Gateway([missing(1)]))
    port = serving[0].port
    serving[0].server.shutdown()
    serving.pop().server.server_close()
    assert "does not answer" in str(why_not_ready(Endpoint(f"http://127.0.0.1:{port}", "")))


def test_one_line_is_said_once_all_is_there(
    serving: list[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announce, "POLL_S", 0.01)
    monkeypatch.setattr(announce, "LOG_DELAY_S", 0.0)
    monkeypatch.setattr(announce, "LONG_S", 0.0)
    serving.append(Gateway([(404, b""), *[missing(2)] * 5, (200, b"{}")]))
    port = serving[0].port
    said: Queue[str] = Queue()
    [start] = announce.announce(document(http_port=port), said.put, time.monotonic() - 100.0)
    lines = [said.get(timeout=LIMIT_S) for _ in range(2)]
    assert start.is_ready.is_set()
    assert said.empty()
    assert lines[0].startswith("expertmesh: not ready after 100 s: ")
    assert lines[1].startswith(
        f"expertmesh: ready after 100 s: HTTP http://127.0.0.1:{port}/v1, gRPC 127.0.0.1:9000; "
    )
    assert serving[0].answers == [(200, b"{}")]


def test_a_terminal_has_a_bar_while_actors_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with LoadingBar(console) as bar:
        assert bar.is_shown
        bar.show(())
        assert shown.getvalue() == ""  # nobody loads
        for held in (2, 6):
            bar.show((LoadingStatus("a", held, 8, 10**9), LoadingStatus("b", 0, 8, 0)))
    assert "6 of 16 experts (38%, 1.0 GB) on 2 actors" in shown.getvalue()


def test_a_command_that_ends_meanwhile_gives_the_terminal_its_cursor_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(announce.atexit, "register", at_exit.append)
    shown = io.StringIO()
    bar = LoadingBar(Console(file=shown, force_terminal=True, width=100))
    bar.show((LoadingStatus("a", 2, 8, 0),))
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert (hidden in shown.getvalue(), visible in shown.getvalue()) == (True, False)
    [stop] = at_exit
    stop()
    assert shown.getvalue().rindex(visible) > shown.getvalue().rindex(hidden)


@pytest.mark.parametrize("console", [None, Console(file=io.StringIO())])
def test_elsewhere_there_is_no_bar(console: Console | None) -> None:
    with LoadingBar(console) as bar:
        assert not bar.is_shown


def test_a_server_that_is_not_there_tells_of_no_loading() -> None:
    assert announce._loading(Endpoint("", "127.0.0.1:1")) == ()
