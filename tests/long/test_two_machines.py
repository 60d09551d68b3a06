"""Two machines on one computer, by the commands of the guide; one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from benchmarks.shipped import free_ports
from router.client import Client
from tests.cluster_fixture import TINY, StreamReader, greedy, wait_until
from tests.environment import without_ray
from tests.readme import ROOT, blocks
from tests.serve_run import copy_with_ports

GUIDE = ROOT / "docs" / "multi-node.md"
STARTED_S, BACK_S, LENGTH = 120.0, 90.0, 900


@contextmanager
def started(command: str, variables: dict[str, str], log: Path) -> Iterator[psutil.Process]:
    """Run a command until the block ends; ends all that it has started, and nothing else."""
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], env=variables, stdout=output, stderr=output
        )
    process = psutil.Process(shell.pid)
    try:
        yield process
    finally:
        kill(process)
        shell.wait(10)


def kill(process: psutil.Process) -> None:
    """Kill a process and all below it, as the loss of a machine would."""
    for one in [process, *process.children(recursive=True)] if process.is_running() else []:
        if one.is_running():
            one.kill()


@pytest.mark.timeout(400)
def test_the_guides_commands_serve_and_survive_a_killed_machine(tmp_path: Path) -> None:
    texts = [block.text for block in blocks(GUIDE.read_text(encoding="utf-8"))]
    [head] = [text.strip() for text in texts if text.startswith("ray start --head --block")]
    [worker] = [text.strip() for text in texts if text.startswith("ray start --address")]
    [asks] = [text for text in texts if text.startswith("expertmesh deploy deploy/cluster.yaml")]
    gcs, dashboard, client_port, http_port, grpc_port = free_ports(5)
    kept = without_ray()
    path = os.pathsep.join([sysconfig.get_path("scripts"), kept["PATH"]])
    own = {
        "PATH": path,
        "HOME": str(tmp_path),
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "EXPERTMESH_ADDRESS": f"127.0.0.1:{grpc_port}",
    }
    variables = {**kept, **own, "RAY_AUTH_MODE": "token"}
    subprocess.run(
        ["ray", "get-auth-token", "--generate"], env=variables, check=True, capture_output=True
    )
    (tmp_path / "deploy").mkdir()
    copy_with_ports(tmp_path / "deploy", http_port, grpc_port)
    ports = f" --port {gcs} --dashboard-port {dashboard} --ray-client-server-port {client_port}"
    with TemporaryDirectory(prefix="ray") as folder, ExitStack() as running:  # short, for sockets
        running.enter_context(
            started(f"{head}{ports} --temp-dir {folder}", variables, tmp_path / "head.log")
        )
        joins = worker.replace("6379", str(gcs))
        wait_until(lambda: b"--block" in (tmp_path / "head.log").read_bytes(), "a head", STARTED_S)
        second = running.enter_context(started(joins, variables, tmp_path / "worker.log"))
        wait_until(
            lambda: b"--block" in (tmp_path / "worker.log").read_bytes(), "a node", STARTED_S
        )
        done = subprocess.run(
            ["bash", "-ec", asks],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=STARTED_S,
        )
        assert done.returncode == 0, done.stderr
        assert "expertmesh: serving deploy/cluster.yaml\n" in done.stdout
        with Client(f"127.0.0.1:{grpc_port}") as client:
            before = client.status()
            assert len({actor.node for actor in before.actors}) == 2
            [expected] = client.generate("In the beginning", greedy(LENGTH), model=TINY)
            stream = StreamReader(client, "In the beginning", greedy(LENGTH), TINY, BACK_S)
            stream.wait_tokens(1)
            kill(second)
            assert stream.result(BACK_S) == expected.token_ids
            after = wait_until(
                lambda: (told := client.status()).missing_experts == 0 and told, "whole", BACK_S
            )
        assert {actor.pid for actor in before.actors} != {actor.pid for actor in after.actors}
        assert len({actor.node for actor in after.actors}) == 1
