"""``serve run`` and ``expertmesh serve`` of a file, as a user starts them, on ports of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import psutil
import yaml

from benchmarks.shipped import DEPLOYED, interruptible, serve_command, shipped_document, with_ports
from router.client import Client
from router.ops.doctor.running_ray import loopback_of
from tests.cluster_fixture import TINY, TLS, greedy, wait_until
from tests.environment import without_ray

READY_S = 400.0
ASK_S = 60.0
RAYS_LIMIT = "The current node timed out during startup"
"""How a command ends where Ray did not start in its 30 s."""
IN_ANOTHER_SHELL = "in another shell: export "
TEN_LINES = """\
applications:
  - name: expertmesh
    import_path: router.app:build
    args:
      models:
        - id: mesh-tiny
          path: models/mesh-tiny
      experts:
        actors: 2
"""
_ENVIRONMENTS = """
import json, os, sys, ray
from ray.util import list_named_actors
ray.init(sys.argv[1], namespace="serve", log_to_driver=False, logging_level="error")
names = [one["name"] for one in list_named_actors(True) if one["name"].startswith("SERVE_")]
asked = [ray.get_actor(name).__ray_call__.remote(lambda _: dict(os.environ)) for name in names]
print(json.dumps(dict(zip(names, ray.get(asked, timeout=30), strict=True))))
"""


@contextmanager
def serve_run(file: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``serve run`` on a Ray of its own; ends what is left of it, and nothing else.

    ``variables`` are added to its environment.
    """
    with run_command(serve_command(file), file.parent, log, variables) as process:
        yield process


Start = Callable[[Path, Path], AbstractContextManager[subprocess.Popen[bytes]]]


@contextmanager
def ready_serve(
    file: Path, log: Path, http_port: int, start: Start = serve_run
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as :func:`serve_run` does, until every expert has a live copy, and on.

    One busy core may exceed Ray's own limit of a start, which nothing sets. Then it starts again.
    """
    for is_last in (False, False, True):
        with start(file, log) as process:
            try:
                wait_ready(process, log, http_port)
            except AssertionError:
                if is_last or RAYS_LIMIT not in log.read_text():
                    raise
                continue
            yield process
            return


@contextmanager
def expertmesh_serve(file: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``expertmesh serve`` as :func:`serve_run` runs ``serve run``."""
    command = interruptible("expertmesh", "serve", "--ray-address", "local", str(file))
    with run_command(command, file.parent, log, variables) as process:
        yield process


@contextmanager
def run_command(
    command: list[str], folder: Path, log: Path, variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that serves, in a folder; ends what is left of it, and nothing else."""
    environment = without_ray() | {**variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
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


def other_shell(log: Path) -> dict[str, str]:
    """Return the variables that ``serve run`` has told another shell to set."""
    [line] = [line for line in log.read_text().splitlines() if f" {IN_ANOTHER_SHELL}" in line]
    words = line.partition(IN_ANOTHER_SHELL)[2].split()
    return dict(word.split("=", 1) for word in words)


def serve_cli(*words: str, **variables: str) -> str:
    """Run a command of Serve in another shell, where no variable of Ray is set but these.

    Returns what it prints; fails when it fails.
    """
    kept = without_ray()
    done = subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "serve"), *words],
        env={**kept, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ASK_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_with_ports(folder: Path, http_port: int, grpc_port: int, shipped: Path = DEPLOYED) -> Path:
    """Write a copy of a shipped file that listens elsewhere."""
    document = shipped_document(http_port, grpc_port, shipped)
    file = folder / shipped.name
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def ten_lines_with_ports(folder: Path, http_port: int, grpc_port: int) -> Path:
    """Write a file of ten lines, and where it listens."""
    document = yaml.safe_load(TEN_LINES)
    [application] = document["applications"]
    application["args"] = with_ports(application["args"], http_port, grpc_port)
    file = folder / "my.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def serve_environments(process: subprocess.Popen[bytes]) -> dict[str, dict[str, str]]:
    """Return the environment of Serve's actors, by name: controller, proxies and replicas.

    They are asked as actors: those that give themselves a title write it over what the system has.
    """
    raylets = [
        child.cmdline()
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name() == "raylet"
    ]
    [words] = raylets
    [address] = [w.partition("=")[2] for w in words if w.startswith("--gcs-address=")]
    done = subprocess.run(
        [sys.executable, "-c", _ENVIRONMENTS, address],
        env={**os.environ, "RAY_AUTH_MODE": "token", **loopback_of(address)},
        capture_output=True,
        text=True,
        timeout=ASK_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def answers_everywhere(http_port: int, client: Client) -> None:
    """Assert that the bundled model answers by gRPC and by HTTP, and alike."""
    [reply] = client.generate("In the beginning", greedy(5), model=TINY)
    body = {"model": TINY, "prompt": "In the beginning", "max_tokens": 5, "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{http_port}/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == reply.text
    assert client.status().live_copies == 1


def wait_ready(process: subprocess.Popen[bytes], log: Path, http_port: int) -> None:
    """Wait until every expert has a live copy; fails when the command ends before."""

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return httpx.get(f"http://127.0.0.1:{http_port}/ready", verify=TLS).status_code == 200

    wait_until(ready, "serve run is ready", READY_S)
