"""What ``serve run`` says when requests are answered."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks.shipped import free_ports
from cluster.reports import LoadingStatus
from router.messages.prediction import MIXTURE_PLATFORM
from router.ops.startup import announce
from router.ops.startup.announce import Endpoint, LoadingBar, endpoints, why_not_ready
from router.security.certificates import Certificates
from router.serve.options import completed
from tests.client_tls import Pair
from tests.unit.web_server import web_server

DEPLOY = Path(__file__).parents[5] / "deploy"
LIMIT_S = 60.0


def document(**listen: Any) -> dict[str, Any]:
    """Return the deployment file, completed, with these keys of ``gateway.listen``."""
    told = completed(yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8")))
    told["applications"][0]["args"]["gateway"]["listen"] = listen
    return told


Reply = tuple[int, Any]


class Gateway:
    """Answers ``/ready`` by what ``answers`` has next, and then by the last of it.

    Completions and predictions are answered by what ``completions`` has, in the same way.
    """

    def __init__(self, *answers: Reply) -> None:
        self.answers = list(answers or [(200, {})])
        self.completions: list[Reply] = [(200, {})]
        self.metadata: dict[str, Any] = {}
        self.paths: list[str] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, path: str, body: bytes) -> Reply:
        self.paths.append(path)
        if body:
            self.asked.append(json.loads(body))
        elif path.startswith("/v2/"):
            return (200, self.metadata[path]) if path in self.metadata else (404, {})
        left = self.completions if body else self.answers
        return left.pop(0) if len(left) > 1 else left[0]


def missing(count: int) -> Reply:
    return 503, {"ready": False, "reason": f"{count} experts have no live copy"}


def test_the_shipped_file_is_reached_at_the_default_addresses() -> None:
    [endpoint] = endpoints(document())
    assert endpoint == Endpoint(
        "http://127.0.0.1:8000", "127.0.0.1:9000", ("mesh-tiny",), "127.0.0.1:9001"
    )
    assert endpoint.command() == 'expertmesh generate "And the LORD said" --temperature 0 --stream'


def test_each_application_of_ours_is_told_as_this_machine_reaches_it() -> None:
    listen = {"host": "0.0.0.0", "http_port": 81, "grpc_port": 91, "admin_host": "10.1.2.3"}
    told = document(**listen, tls={"certificate": "c", "key": "k"})
    args = {"models": [{"id": "a"}, {"id": "b"}], "gateway": {"listen": {"http_port": 82}}}
    told["applications"] += [
        {"name": "other", "import_path": "other:app"},
        {"import_path": "router.app:build", "args": args},
    ]
    first, second = endpoints(told)
    assert first == Endpoint(
        "https://127.0.0.1:81", "127.0.0.1:91", ("mesh-tiny",), "10.1.2.3:9001"
    )
    assert first.command().endswith(" --address 127.0.0.1:91")
    assert first.command().startswith("expertmesh --tls-ca FILE generate ")
    assert (second.http_url, second.models) == ("http://127.0.0.1:82", ("a", "b"))
    assert endpoints({"applications": []}) == []


def test_a_server_that_asks_for_a_certificate_gets_the_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path / "tls", asks_clients=True)
    wanted = "asks clients for a certificate: name one in EXPERTMESH_TLS_CERT"
    with web_server(Gateway(), Certificates(pair.files).current().context) as port:
        endpoint = Endpoint(f"https://127.0.0.1:{port}", "")
        # The end of the connection may come before its reason, on a busy machine often.
        until_s = time.monotonic() + LIMIT_S
        while wanted not in str(why_not_ready(endpoint)):
            assert time.monotonic() < until_s
        monkeypatch.setenv("EXPERTMESH_TLS_CERT", pair.client)
        monkeypatch.setenv("EXPERTMESH_TLS_KEY", pair.client_key)
        assert why_not_ready(endpoint) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, {}), None),
        (missing(3), "3 experts have no live copy"),
        ((404, b"Path '/ready' not found."), "HTTP status 404"),
        ((503, [1]), "HTTP status 503"),
        ((503, {"reason": None}), "HTTP status 503"),
    ],
)
def test_what_ready_answers_is_read(answer: Reply, reason: str | None) -> None:
    gateway = Gateway(answer)
    with web_server(gateway) as port:
        assert why_not_ready(Endpoint(f"http://127.0.0.1:{port}", "")) == reason
    assert gateway.paths == ["/ready"]


def test_each_model_must_answer_too() -> None:
    gateway = Gateway()
    with web_server(gateway) as port:
        endpoint = Endpoint(f"http://127.0.0.1:{port}", "", ("a", "b"))
        assert why_not_ready(endpoint) is None
        completions = "/v1/completions"
        assert gateway.paths == ["/ready", "/v2/models/a", completions, "/v2/models/b", completions]
        assert [one["model"] for one in gateway.asked] == ["a", "b"]
        assert all(one["max_tokens"] == 1 for one in gateway.asked)
        gateway.completions = [(200, {}), (503, {})]
        assert why_not_ready(endpoint) == "HTTP status 503"


def test_a_mixture_must_predict() -> None:
    gateway = Gateway()
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [-1, -1, 3]},
        {"name": "k", "datatype": "INT64", "shape": [-1, 1]},
    ]
    gateway.metadata["/v2/models/digits"] = {"platform": MIXTURE_PLATFORM, "inputs": inputs}
    with web_server(gateway) as port:
        endpoint = Endpoint(f"http://127.0.0.1:{port}", "", ("digits",))
        assert why_not_ready(endpoint) is None
        assert gateway.paths[-1] == "/v2/models/digits/infer"
        [asked] = gateway.asked
        assert asked["inputs"] == [
            {"name": "x", "datatype": "FP32", "shape": [1, 1, 3], "data": [0, 0, 0]},
            {"name": "k", "datatype": "INT64", "shape": [1, 1], "data": [0]},
        ]
        assert endpoint.command() == f"curl http://127.0.0.1:{port}/v2/models/digits"
        gateway.completions = [(503, {})]
        assert why_not_ready(endpoint) == "HTTP status 503"


def test_nobody_there_is_a_reason_too_and_nothing_loads() -> None:
    [nobody] = free_ports(1)
    endpoint = Endpoint(f"http://127.0.0.1:{nobody}", f"127.0.0.1:{nobody}")
    assert "does not answer" in str(why_not_ready(endpoint))
    assert announce._loading(endpoint) == ()


def test_one_line_is_said_once_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "POLL_S", 0.01)
    monkeypatch.setattr(announce, "LOG_DELAY_S", 0.0)
    monkeypatch.setattr(announce, "LONG_S", 0.0)
    gateway = Gateway((404, b""), *[missing(2)] * 5, (200, {}))
    said: Queue[str] = Queue()
    with web_server(gateway) as port:
        [start] = announce.announce(document(http_port=port), said.put, time.monotonic() - 100.0)
        lines = [said.get(timeout=LIMIT_S) for _ in range(2)]
    assert start.is_ready.is_set()
    assert said.empty()
    assert lines[0].startswith("expertmesh: not ready after 100 s: ")
    assert lines[1].startswith(
        f"expertmesh: ready after 100 s: HTTP http://127.0.0.1:{port}/v1, gRPC 127.0.0.1:9000; "
    )
    assert gateway.answers == [(200, {})]


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
