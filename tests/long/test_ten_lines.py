"""A user's ten lines, by ``expertmesh serve``, which adds Serve's part, and by ``serve run``."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from benchmarks.shipped import free_ports
from cluster.errors import UnavailableError
from router.client import Client
from router.serve.options import completed, serve_variables
from tests.cluster_fixture import TINY, StreamReader, greedy, is_alive, wait_until
from tests.serve_run import (
    READY_S,
    answers_everywhere,
    expertmesh_serve,
    serve_environments,
    serve_run,
    ten_lines_with_ports,
    wait_ready,
)

SAYS_S, GONE_S, MAX_LINES = 10.0, 10.0, 14
LENGTH = 900
READY = "expertmesh: ready after"
MAX_LINES_ALONE = 22
"""Serve writes eight of its own before it imports anything of ours."""


@pytest.mark.timeout(180)
def test_ten_lines_are_served_in_full_by_expertmesh_serve(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = ten_lines_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    address = f"127.0.0.1:{grpc_port}"
    with expertmesh_serve(file, log) as process, Client(address, retry=None) as client:
        wait_ready(process, log, http_port)
        answers_everywhere(http_port, client)
        wait_until(lambda: READY in log.read_text(), "the command says so", SAYS_S)
        lines = log.read_text().splitlines()
        told = [line for line in lines if not line.startswith("expertmesh: not ready after")]
        assert len(told) <= MAX_LINES, "\n".join(lines)
        assert f"HTTP http://127.0.0.1:{http_port}/v1, gRPC {address};" in lines[-1]
        expected = serve_variables(completed(yaml.safe_load(file.read_text())))
        found = serve_environments(process)
        assert len(found) >= 6
        for name, variables in found.items():
            assert {key: variables.get(key) for key in expected} == expected, name
        stream = StreamReader(client, "In the", greedy(LENGTH), TINY)
        stream.wait_tokens(1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in log.read_text(), "the command says so", SAYS_S)
        assert len(stream.token_ids) < LENGTH
        stream.wait_end()
        assert (stream.error, len(stream.token_ids)) == (None, LENGTH)
        process.wait(GONE_S)
    assert process.returncode == 0
    text = log.read_text()
    assert [line for line in text.splitlines()[len(lines) :] if line.startswith("expertmesh:")] == [
        "expertmesh: SIGTERM: ends once the requests under way are done (1, at most 3600 s); "
        "another signal ends them now"
    ]
    assert not {"Traceback", "***"} & set(text.split())


@pytest.mark.timeout(180)
def test_ten_lines_are_served_by_serve_run_alone(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = ten_lines_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    file.write_text(file.read_text().replace("http_options: {", "http_options: {host: 127.0.0.1, "))
    with serve_run(file, log) as process, Client(f"127.0.0.1:{grpc_port}", retry=None) as client:
        wait_ready(process, log, http_port)
        answers_everywhere(http_port, client)
        text = log.read_text()
        assert "Serve was started by the file alone" in text
        assert f"gRPC: this gateway answers on 127.0.0.1:{grpc_port}" in text
        assert len(text.splitlines()) <= MAX_LINES_ALONE, text
        for _ in range(5):
            answers_everywhere(http_port, client)
        assert len(log.read_text().splitlines()) <= MAX_LINES_ALONE, log.read_text()
        pids = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        stream = StreamReader(client, "In the", greedy(LENGTH), TINY)
        stream.wait_tokens(1)
        process.send_signal(signal.SIGINT)
        process.wait(GONE_S)
        stream.wait_end()
        assert isinstance(stream.error, UnavailableError)
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "none is left", GONE_S)
    assert "Traceback" not in log.read_text()


@pytest.mark.timeout(180)
def test_serve_run_alone_lets_no_other_machine_in_without_keys(tmp_path: Path) -> None:
    """Serve itself listens on all interfaces where the file says nothing."""
    http_port, grpc_port = free_ports(2)
    file, log = ten_lines_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    with serve_run(file, log) as process:
        wait_until(lambda: "and no keys: make a key" in log.read_text(), "it is refused", READY_S)
        assert process.poll() is None  # Serve goes on, without the application
        assert httpx.get(f"http://127.0.0.1:{http_port}/ready").status_code == 404
