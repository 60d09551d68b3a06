"""TLS towards clients on a real deployment: what each port answers to whom, and a replacement."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from benchmarks.shipped import free_ports
from router.client import Client, UnreachableError
from router.client.tls import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE
from router.protos import inference_pb2
from tests.client_tls import Pair, shown_number
from tests.cluster_fixture import TINY, StreamReader, greedy, wait_until
from tests.long.test_keys import listeners
from tests.serve_run import READY_S, copy_with_ports, serve_run

STREAMS, LENGTH = 16, 400
ASK_S, CHANGES_S = 3.0, 15.0
MODEL_INFO = "/expertmesh.v1.Inference/GetModelInfo"
HOST = "127.0.0.1"

logger = logging.getLogger(__name__)


def deployment(folder: Path, pair: Pair, http: int, grpc_port: int) -> Path:
    file = copy_with_ports(folder, http, grpc_port)
    document = yaml.safe_load(file.read_text())
    args = document["applications"][0]["args"]
    args["security"] = "open"
    args["gateway"]["listen"] |= {"host": "0.0.0.0", "tls": pair.listen()}
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.timeout(300)
@pytest.mark.parametrize("asks_clients", [True, False])
def test_clients_ports_have_tls_and_a_new_certificate_breaks_no_stream(
    tmp_path: Path, asks_clients: bool
) -> None:
    pair, stranger = Pair(tmp_path / "tls", asks_clients), Pair(tmp_path / "other")
    http, grpc_port = free_ports(2)
    file, log = deployment(tmp_path, pair, http, grpc_port), tmp_path / "log"
    shown = {CERTIFICATE_VARIABLE: pair.client, KEY_VARIABLE: pair.client_key}
    shown[AUTHORITY_VARIABLE] = pair.authority
    with (
        serve_run(file, log, **shown) as process,
        Client(f"{HOST}:{grpc_port}", tls=pair.tls(), retry=None) as client,
    ):
        wait_until(lambda: is_announced(process, log), "serve run is ready", READY_S)
        ports = listeners(process)
        assert not [host for port in (http, grpc_port) for host in ports[port] if is_own(host)]
        assert all(map(is_own, ports[grpc_port + 1]))
        answers_clients_with_tls(ports, http, grpc_port, pair, stranger)
        operators_port_is_closed(pair, stranger, f"{HOST}:{grpc_port}")
        streams_outlive_a_replacement(pair, client, http, grpc_port)
        unusable_files_are_told(pair, client, http, log)


def is_announced(process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    return "expertmesh: ready after" in log.read_text()


def is_own(host: str) -> bool:
    return host.removeprefix("::ffff:") in (HOST, "::1")


def answers_clients_with_tls(
    ports: Iterable[int], http: int, grpc_port: int, pair: Pair, stranger: Pair
) -> None:
    """Assert that clients are answered only with TLS, and only on their two ports."""
    trusts = {
        "nothing to show": pair.context(has_certificate=False),
        "own certificate": pair.context(),
        "another authority": stranger.context(),
    }
    cases: dict[tuple[int, str], Callable[[], bool]] = {}
    for port in ports:
        cases[port, "plain HTTP"] = lambda port=port: answers_http(f"http://{HOST}:{port}", True)
        cases[port, "plain gRPC"] = lambda port=port: answers_grpc(port, None)
        for name, context in trusts.items():
            url = f"https://{HOST}:{port}"
            cases[port, f"HTTP, {name}"] = lambda url=url, context=context: answers_http(
                url, context
            )
        for name, tls in (
            ("nothing to show", pair.tls(has_certificate=False)),
            ("own certificate", pair.tls()),
            ("another authority", stranger.tls()),
        ):
            cases[port, f"gRPC, {name}"] = lambda port=port, tls=tls: answers_grpc(port, tls)
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(cases, pool.map(lambda ask: ask(), cases.values()), strict=True))
    by_case: dict[str, set[int]] = {}
    for (port, case), is_answered in answers.items():
        by_case.setdefault(case, set()).update({port} if is_answered else ())
    for case, found in sorted(by_case.items()):
        logger.warning("%s: %s", case, sorted(found))
    for kind, port in (("HTTP", http), ("gRPC", grpc_port)):
        assert by_case[f"plain {kind}"] == set()
        assert by_case[f"{kind}, own certificate"] == {port}
        assert by_case[f"{kind}, another authority"] == set()
        assert by_case[f"{kind}, nothing to show"] == (set() if pair.asks_clients else {port})


def operators_port_is_closed(pair: Pair, stranger: Pair, address: str) -> None:
    """Assert that operators' commands need TLS, and a certificate where clients do."""
    without = [pair.tls(has_certificate=False)] if pair.asks_clients else []
    for tls in (None, stranger.tls(), *without):
        with Client(address, retry=None, tls=tls) as refused, pytest.raises(UnreachableError):
            refused.status()


def answers_http(url: str, verify: Any) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", verify=verify, timeout=ASK_S).status_code == 200
    except httpx.HTTPError:
        return False


def answers_grpc(port: int, tls: Any) -> bool:
    address = f"{HOST}:{port}"
    channel = (
        grpc.insecure_channel(address)
        if tls is None
        else grpc.secure_channel(address, tls.credentials())
    )
    with channel:
        try:
            request = inference_pb2.GetModelInfoRequest().SerializeToString()
            channel.unary_unary(MODEL_INFO)(request, timeout=ASK_S)
        except grpc.RpcError:
            return False
    return True


def streams_outlive_a_replacement(pair: Pair, client: Client, http: int, grpc_port: int) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [StreamReader(client, "In the", greedy(LENGTH), TINY) for _ in range(STREAMS)]
        texts = [pool.submit(http_stream, pair, http) for _ in range(STREAMS)]
        for stream in streams:
            stream.wait_tokens(1)
        replaced_at_s = time.monotonic()
        number = pair.replace()
        for port in (http, grpc_port, grpc_port + 1):
            wait_until(
                lambda port=port: shown_number(HOST, port, pair.context()) == number,
                f"port {port} shows the new certificate",
                CHANGES_S,
            )
        took_s = time.monotonic() - replaced_at_s
        running = sum(not stream.ended for stream in streams)
        logger.warning("in force after %.1f s, %d streams still run", took_s, running)
        assert all(len(stream.result()) == LENGTH for stream in streams)
        assert all(text.result(60) for text in texts)
    assert client.status().live_copies == 1


def http_stream(pair: Pair, port: int) -> bool:
    """Return whether a stream of HTTP came to its end."""
    body = {"model": TINY, "prompt": "In the", "max_tokens": LENGTH, "stream": True}
    url = f"https://{HOST}:{port}/v1/completions"
    with httpx.stream("POST", url, json=body, verify=pair.context(), timeout=60) as answer:
        lines = list(answer.iter_lines())
    return answer.status_code == 200 and "data: [DONE]" in lines


def unusable_files_are_told(pair: Pair, client: Client, http: int, log: Path) -> None:
    kept = shown_number(HOST, http, pair.context())
    pair.replace(ends_at=datetime.now(UTC) - timedelta(days=1))
    wait_until(
        lambda: any("expired" in one.problem for one in client.status().gateways),
        "status has the problem",
        CHANGES_S,
    )
    assert shown_number(HOST, http, pair.context()) == kept
    wait_until(lambda: "stay in force" in log.read_text(), "the log has the error", CHANGES_S)
    pair.replace()
    wait_until(
        lambda: not any(one.problem for one in client.status().gateways), "mended", CHANGES_S
    )
