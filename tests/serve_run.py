"""``serve run`` of the shipped deployment, as a user starts it, on ports of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import yaml

from benchmarks.shipped import serve_command, shipped_document
from tests.cluster_fixture import wait_until

READY_S = 90.0


@contextmanager
def serve_run(file: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``serve run`` on a Ray of its own; ends what is left of it, and nothing else.

    ``variables`` are added to its environment.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(file),
            cwd=file.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
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


def wait_ready(process: subprocess.Popen[bytes], log: Path, http_port: int) -> None:
    """Wait until every expert has a live copy; fails when the command ends before."""

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return httpx.get(f"http://127.0.0.1:{http_port}/ready").status_code == 200

    wait_until(ready, "serve run is ready", READY_S)
