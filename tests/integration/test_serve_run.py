"""``serve run deploy/cluster.yaml`` as the README has it: ready, quiet, and gone after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from benchmarks.shipped import free_ports, shipped_document
from cluster.errors import UnavailableError
from router.client import Client
from tests.cluster_fixture import TINY, StreamReader, greedy, is_alive, wait_until

SERVE = str(Path(sysconfig.get_path("scripts")) / "serve")
READY_S, SAYS_S, GONE_S, MAX_LINES = 90.0, 10.0, 10.0, 16
STREAMS, CHOICES, LENGTH = 4, 8, 900


@contextmanager
def serve_run(file: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``serve run`` on a Ray of its own; ends what is left of it, and nothing else.

    ``variables`` are added to its environment.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SERVE, "run", "-a", "local", str(file)],
            cwd=file.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Where the tests run in the background, Ctrl-C would be ignored here too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    left: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            left = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for child in left:
            if child.is_running():
                child.kill()
        process.wait(10)


def copy_with_ports(folder: Path, http_port: int, grpc_port: int) -> Path:
    """Write a copy of the deployed file that listens elsewhere."""
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(shipped_document(http_port, grpc_port), sort_keys=False))
    return file


@pytest.mark.timeout(180)
def test_serve_run_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = copy_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    with serve_run(file, log) as process, Client(f"127.0.0.1:{grpc_port}", retry=None) as client:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return httpx.get(f"http://127.0.0.1:{http_port}/ready").status_code == 200

        wait_until(ready, "serve run is ready", READY_S)
        [reply] = client.generate("In the beginning", greedy(5), model=TINY)
        assert len(reply.token_ids) == 5
        told = client.status()
        pids = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        pids |= {part.pid for part in (*told.routers, *told.gateways, *told.actors)}
        pids |= {told.controller_pid}
        assert len(pids) > 5
        wait_until(lambda: "ready after" in log.read_text(), "the command says so", SAYS_S)
        lines = log.read_text().splitlines()
        assert len(lines) <= MAX_LINES, "\n".join(lines)
        assert lines[-1].startswith("expertmesh: ready after"), "\n".join(lines)
        assert f"HTTP http://127.0.0.1:{http_port}/v1, gRPC 127.0.0.1:{grpc_port};" in lines[-1]
        assert any("experts have a live copy" in line for line in lines)

        sampling = greedy(LENGTH, n=CHOICES)
        streams = [StreamReader(client, "In the", sampling, TINY) for _ in range(STREAMS)]
        for stream in streams:
            stream.wait_tokens(CHOICES)
        ends_s = time.monotonic() + GONE_S
        process.send_signal(signal.SIGINT)
        process.wait(GONE_S)
        left_s = ends_s - time.monotonic()
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "no process is left", left_s)
        for stream in streams:
            stream.wait_end()
            assert isinstance(stream.error, UnavailableError)
    assert "Traceback" not in log.read_text()


def test_serve_run_on_a_bad_file_ends_with_one_clear_line(tmp_path: Path) -> None:
    file, log = copy_with_ports(tmp_path, *free_ports(2)), tmp_path / "log"
    file.write_text(file.read_text().replace("actors: 2", "actors: none"))
    with serve_run(file, log) as process:
        assert process.wait(60) not in (0, None)
    lines = [line for line in log.read_text().splitlines() if "expertmesh:" in line]
    assert len(lines) == 1
    assert "args.experts.actors" in lines[0]
    assert "Traceback" not in log.read_text()
