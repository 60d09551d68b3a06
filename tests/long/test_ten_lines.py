"""A user's ten lines: ``expertmesh serve`` adds Serve's part, and ``serve run`` refuses them."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
import yaml

from benchmarks.shipped import free_ports
from router.client import Client
from router.serve.options import completed
from tests.cluster_fixture import TINY, StreamReader, greedy, wait_until
from tests.serve_run import (
    READY_S,
    answers_everywhere,
    expertmesh_serve,
    serve_environments,
    serve_run,
    ten_lines_with_ports,
    wait_ready,
)

SAYS_S, GONE_S, MAX_LINES = 10.0, 10.0, 12
LENGTH = 900
HOST = "127.0.0.1"
READY = "expertmesh: ready after"
WRITES = "write `proxy_location: Disabled` at the top of the deployment file"


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
        document = completed(yaml.safe_load(file.read_text()))
        expected: dict[str, str] = document["controller_options"]["runtime_env"]["env_vars"]
        found = serve_environments(process)
        assert len(found) == 4  # Serve's controller, ours, the gateway and the router
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
def test_serve_run_refuses_ten_lines_and_says_what_to_write(tmp_path: Path) -> None:
    http_port, grpc_port, of_serve = free_ports(3)
    file, log = ten_lines_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    # Serve's proxy would have port 8000, which another Serve on this machine may have.
    file.write_text(f"http_options: {{port: {of_serve}}}\n{file.read_text()}")
    with serve_run(file, log) as process:
        wait_until(lambda: WRITES in log.read_text(), "the builder refuses", READY_S)
        assert process.poll() is None  # Serve itself goes on, without an application
        for port in (http_port, grpc_port):
            with pytest.raises(ConnectionRefusedError), socket.create_connection((HOST, port)):
                pass
    assert "or start it by `expertmesh serve`" in log.read_text()
