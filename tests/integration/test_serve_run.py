"""``expertmesh serve`` and ``serve run`` of the shipped file: ready, quiet, gone in the end."""

from __future__ import annotations

import signal
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from benchmarks.shipped import free_ports
from cluster.errors import UnavailableError
from router.client import Client
from router.gateway.listen.claim import why_taken
from tests.cluster_fixture import TINY, TLS, StreamReader, greedy, is_alive, wait_until
from tests.environment import without_ray
from tests.fault.signals import named_pids
from tests.serve_run import (
    READY_S,
    answers_everywhere,
    copy_with_ports,
    expertmesh_serve,
    other_shell,
    ready_serve,
    serve_environments,
    serve_run,
)
from tests.signal_at_start import STACKS

SAYS_S, GONE_S, MAX_LINES = 60.0, 60.0, 12
SHORT = 500
"""Tokens of a stream that is under way when SIGTERM comes, and ends before the others."""
STREAMS, CHOICES, LENGTH = 2, 4, 900
"""All choices fit into one batch, and none of them ends before it is told to."""
RAYS = {
    "raylet",
    "gcs_server",
    "dashboard.py",
    "monitor.py",
    "log_monitor.py",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
}
"""Ray's own processes, which listen as Ray is told."""
READY = "expertmesh: ready after"
OF_THE_MACHINE = (
    "expertmesh: not ready after",
    "expertmesh.controller: loading: ",
    "file_system_monitor",
    "replicas that have taken more than 30s to",
)
"""A start beside busy programs says so, and so do slow loading, a full disk and late replicas."""
RAYS_ABORT, BUILDER = "Mutex corrupt", "(build_serve_application pid="
"""On a busy machine Ray's worker may abort at its end, after the application is built."""


def test_expertmesh_serve_drains_and_leaves_nothing_behind(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = copy_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    with (
        ready_serve(file, log, http_port, expertmesh_serve) as process,
        Client(f"127.0.0.1:{grpc_port}", retry=None) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        [reply] = client.generate("In the beginning", greedy(5), model=TINY)
        assert len(reply.token_ids) == 5
        told = client.status()
        pids = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        pids |= named_pids(told)
        assert len(pids) > 5
        wait_until(lambda: READY in log.read_text(), "the command says so", SAYS_S)
        text = log.read_text()
        ignored = (*OF_THE_MACHINE, BUILDER) if RAYS_ABORT in text else OF_THE_MACHINE
        lines = [line for line in text.splitlines() if not any(each in line for each in ignored)]
        assert len(lines) <= MAX_LINES, "\n".join(lines)
        assert lines[-1].startswith(READY), "\n".join(lines)
        assert f"HTTP http://127.0.0.1:{http_port}/v1, gRPC 127.0.0.1:{grpc_port};" in lines[-1]
        assert any("experts have a live copy" in line for line in lines)
        head = httpx.head(f"http://127.0.0.1:{http_port}/v1/models")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0
        has_serves_part_in_every_process(file, process)
        listens_on_loopback_alone(pids, {http_port, grpc_port, grpc_port + 1})
        # The commands of another shell: tests/integration/test_readme.py.
        assert other_shell(log)["RAY_AUTH_MODE"] == "token"
        deployed_in_vain(file, other_shell(log), client, http_port)

        sampling = greedy(LENGTH, n=CHOICES)
        streams = [StreamReader(client, "In the", sampling, TINY) for _ in range(STREAMS)]
        for stream in streams:
            stream.wait_tokens(1)
        accepted = prompt_tokens(http_port)
        over_http = pool.submit(complete_over_http, http_port)
        wait_until(lambda: prompt_tokens(http_port) > accepted, "the gateway has it", SAYS_S)
        short = StreamReader(client, "In the", greedy(SHORT), TINY)
        short.wait_tokens(1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in log.read_text(), "the command says so", SAYS_S)
        assert len(short.token_ids) < SHORT
        with pytest.raises(UnavailableError, match="deleted") as refused:
            client.generate("In the beginning", greedy(5), model=TINY)
        assert refused.value.retry_after_s == 1.0
        short.wait_end()
        assert (short.error, len(short.token_ids)) == (None, SHORT)
        assert process.poll() is None
        ends_s = time.monotonic() + GONE_S
        process.send_signal(signal.SIGINT)
        process.wait(GONE_S)
        left_s = ends_s - time.monotonic()
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "no process is left", left_s)
        for stream in streams:
            stream.wait_end()
            assert isinstance(stream.error, UnavailableError)
            assert "deleted" in str(stream.error)
        answer = over_http.result(GONE_S)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "deleted" in answer.json()["error"]["message"]
    assert process.returncode == 128 + signal.SIGTERM
    assert_ended_with(
        log,
        [
            "expertmesh: SIGTERM: ends once the requests under way are done "
            f"({2 + STREAMS}, at most 3600 s); another signal ends them now",
            "expertmesh: SIGINT: ending the requests now",
        ],
    )


def deployed_in_vain(
    file: Path, variables: Mapping[str, str], client: Client, http_port: int
) -> None:
    """Deploy a file that fails: it is told everywhere, and the former deployment serves on."""
    bad = file.with_name("bad.yaml")
    bad.write_text(file.read_text().replace("path: models/", "path: no/such/folder/"))
    kept = without_ray()
    done = subprocess.run(
        [str(Path(sysconfig.get_path("scripts")) / "expertmesh"), "deploy", str(bad), "--wait"],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=SAYS_S,
    )
    reason = "is no folder"
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr.splitlines()[-1]
    wait_until(lambda: reason in client.status().failed_deploy, "status tells it", SAYS_S)
    ready = httpx.get(f"http://127.0.0.1:{http_port}/ready")
    assert ready.status_code == 200
    wait_until(
        lambda: reason in str(httpx.get(ready.url).json()["failed_deploy"]), "ready too", SAYS_S
    )


def test_a_killed_command_leaves_nothing_behind(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = copy_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    with ready_serve(file, log, http_port, expertmesh_serve) as process:
        pids = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        with Client(f"127.0.0.1:{grpc_port}", retry=None) as client:
            pids |= named_pids(client.status())
        assert len(pids) > 5
        process.kill()
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "none is left", GONE_S)
    for port in (http_port, grpc_port, grpc_port + 1):
        assert why_taken("127.0.0.1", port) is None  # the next start comes up


def listening(process: psutil.Process) -> tuple[dict[int, IPv4Address | IPv6Address], set[int]]:
    """Return the hosts of a process's ports, and the ports that it has on all interfaces."""
    try:
        connections = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return {}, set()
    hosts = {
        one.laddr.port: ip_address(one.laddr.ip.removeprefix("::ffff:"))
        for one in connections
        if one.status == psutil.CONN_LISTEN
    }
    return hosts, {port for port, host in hosts.items() if host.is_unspecified}


def listens_on_loopback_alone(pids: Collection[int], ports: set[int]) -> None:
    """Assert that gateways listen on their ports alone, and others as Ray and Serve do.

    Each worker of Ray has one port of Ray's, on loopback. Each replica has one of Serve's on all
    interfaces, for calls of other replicas, which asks for Ray's token. Links and streams have Unix
    sockets, for which Ray's calls give the secret.
    """
    own: set[int] = set()
    gateways = 0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            name = process.name()
        except psutil.NoSuchProcess:  # Ray ends workers that it needs no longer
            continue
        hosts, everywhere = listening(process)
        on_loopback = hosts.keys() - everywhere
        assert all(hosts[port].is_loopback for port in on_loopback), (name, hosts)
        assert len(everywhere) <= name.startswith("ray::ServeRepli"), (name, hosts)
        if not name.startswith("ray::") or name in RAYS:
            continue
        assert len(on_loopback - ports) <= 1, (name, hosts)
        gateways += bool(on_loopback & ports)
        own |= on_loopback & ports
        if on_loopback & ports:
            names = [str(one.laddr) for one in process.net_connections("unix")]
            assert any(name.startswith("@expertmesh-") for name in names), names
    assert (own, gateways) == (ports, 1)


def assert_ended_with(log: Path, lines: list[str]) -> None:
    """Assert that these are the command's last lines, and that nobody has printed a stack."""
    text = log.read_text()
    ours = [line for line in text.splitlines() if line.startswith("expertmesh: ")]
    assert ours[-len(lines) - 1].startswith(READY), text
    assert ours[-len(lines) :] == lines, text
    assert not STACKS & set(text.split()), text


def complete_over_http(http_port: int) -> httpx.Response:
    """Ask for more than can be answered in time, without a stream."""
    body = {"model": TINY, "prompt": "In the", "max_tokens": LENGTH, "n": CHOICES}
    body["ignore_eos"] = True
    url = f"http://127.0.0.1:{http_port}/v1/completions"
    return httpx.post(url, json=body, timeout=READY_S)


def prompt_tokens(http_port: int) -> float:
    """Return the prompt tokens of all requests that the gateway has accepted."""
    metrics = httpx.get(f"http://127.0.0.1:{http_port}/metrics", verify=TLS).text
    name = "expertmesh_prompt_tokens_total"
    [line] = [line for line in metrics.splitlines() if line.startswith(name)]
    return float(line.split()[-1])


def has_serves_part_in_every_process(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Assert that the file's variables have reached all of Serve's processes, and no proxy runs."""
    document = yaml.safe_load(file.read_text())
    expected: dict[str, str] = document["controller_options"]["runtime_env"]["env_vars"]
    found = serve_environments(process)
    kinds = Counter(name.partition("#")[0].partition("-")[0] for name in found)
    assert kinds == {"SERVE_CONTROLLER_ACTOR": 1, "SERVE_REPLICA::expertmesh": 3}
    for name, variables in found.items():
        assert {key: variables.get(key) for key in expected} == expected, name


def test_serve_run_serves_and_ends(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    file, log = copy_with_ports(tmp_path, http_port, grpc_port), tmp_path / "log"
    with (
        ready_serve(file, log, http_port) as process,
        Client(f"127.0.0.1:{grpc_port}", retry=None) as client,
    ):
        answers_everywhere(http_port, client)
        wait_until(lambda: READY in log.read_text(), "the command says so", SAYS_S)
        assert other_shell(log)["RAY_AUTH_MODE"] == "token"
        pids = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.send_signal(signal.SIGINT)
        process.wait(GONE_S)
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "no process is left", GONE_S)
    assert process.returncode == 0


def test_serve_run_with_proxies_is_refused_by_the_builder(tmp_path: Path) -> None:
    file, log = copy_with_ports(tmp_path, *free_ports(2)), tmp_path / "log"
    document = yaml.safe_load(file.read_text())
    del document["applications"][0]["deployments"]  # no class of ours, so no check in the command
    del document["proxy_location"]
    document["http_options"] = {"port": free_ports(1)[0]}
    file.write_text(yaml.safe_dump(document))
    with serve_run(file, log):
        said = "write `proxy_location: Disabled` at the top of the deployment file"
        wait_until(lambda: said in log.read_text(), "the builder refuses", READY_S)


def test_serve_run_on_a_bad_file_ends_with_one_clear_line(tmp_path: Path) -> None:
    file, log = copy_with_ports(tmp_path, *free_ports(2)), tmp_path / "log"
    file.write_text(file.read_text().replace("actors: 2", "actors: none"))
    with serve_run(file, log) as process:
        assert process.wait(60) not in (0, None)
    lines = [line for line in log.read_text().splitlines() if "expertmesh:" in line]
    assert len(lines) == 1
    assert "args.experts.actors" in lines[0]
    assert "Traceback" not in log.read_text()
