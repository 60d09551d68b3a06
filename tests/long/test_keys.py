"""A deployment with keys, as it runs: no port of any process answers a stranger."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml

from benchmarks.shipped import free_ports
from cluster.errors import ForbiddenError, OverloadedError, UnauthenticatedError
from cluster.reports import KeyUsage
from router.client import Client
from router.protos import admin_pb2, inference_pb2
from router.protos.errors import DETAILS_KEY, is_from_server
from router.security.keys import Role
from router.security.keys_file import add_key, revoke
from router.security.limits import KeyLimits
from tests.cluster_fixture import TINY, StreamReader, greedy, wait_until
from tests.serve_run import copy_with_ports, serve_run, wait_ready

OURS = ("ray::ServeController", "ray::ServeReplica", "ray::RemoteExpertActor")
ASK_S, LEAVES_S = 2.0, 20.0
STREAMS, LENGTH = 32, 150
GUEST_TOKENS = 100
CALLS = {
    "/expertmesh.v1.Inference/GetModelInfo": inference_pb2.GetModelInfoRequest(),
    "/expertmesh.v1.Admin/GetStatus": admin_pb2.GetStatusRequest(),
    "/ray.serve.RayServeAPIService/ListApplications": admin_pb2.GetStatusRequest(),
}
PATHS = ("/v1/models", "/metrics", "/v2")


class Keys:
    """A file with a key of each role, and a guest's key, which has limits."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.yaml"
        self.of = {role: add_key(self.file, role, [role]) for role in Role}
        limits = KeyLimits(tokens_per_min=GUEST_TOKENS, requests_per_s=100)
        self.guest = add_key(self.file, "guest", [Role.INFERENCE], limits)


def with_keys(folder: Path, keys: Keys, http_port: int, grpc_port: int) -> Path:
    file = copy_with_ports(folder, http_port, grpc_port)
    document = yaml.safe_load(file.read_text())
    document["applications"][0]["args"]["security"] = {"keys_file": str(keys.file)}
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.timeout(180)
def test_nobody_is_answered_without_a_key_and_owners_are(tmp_path: Path) -> None:
    http_port, grpc_port = free_ports(2)
    keys, log = Keys(tmp_path), tmp_path / "log"
    file = with_keys(tmp_path, keys, http_port, grpc_port)
    address = f"127.0.0.1:{grpc_port}"
    with (
        serve_run(file, log) as process,
        Client(address, retry=None, api_key=keys.of[Role.INFERENCE]) as user,
        Client(address, retry=None, api_key=keys.of[Role.ADMIN]) as operator,
    ):
        wait_ready(process, log, http_port)
        [reply] = user.generate("In the beginning", greedy(5), model=TINY)
        assert len(reply.token_ids) == 5
        assert operator.status().live_copies == 1
        with pytest.raises(ForbiddenError, match="needed is admin"):
            user.status()
        with pytest.raises(ForbiddenError, match="needed is inference"):
            operator.generate("In the beginning", greedy(5), model=TINY)

        ports = listeners(process).keys()
        assert {http_port, grpc_port, grpc_port + 1} < ports
        assert len(ports) > 8  # Ray has one in each process, and Serve one in each replica
        shows_strangers_nothing(ports)
        assert answers_owners_over_http(ports, keys) == {http_port}

        limits_hold_on_both_surfaces(keys, http_port, address, operator)
        keys_change_under_streams(keys, address)
        session = session_folder(process)
        told = operator.status()
        assert all(one.problem == "" for one in told.gateways)
        metrics = httpx.get(
            f"http://127.0.0.1:{http_port}/metrics", headers=bearer(keys.of[Role.METRICS])
        ).text
        assert 'expertmesh_refused_callers_total{reason="no_key"' in metrics
        secrets = [*keys.of.values(), "em-canary"]
        texts = [metrics, repr(told), log.read_text()]
        assert not [secret for secret in secrets for text in texts if secret in text]
        assert not files_with(session, secrets)


def limits_hold_on_both_surfaces(
    keys: Keys, http_port: int, address: str, operator: Client
) -> None:
    """Use up the guest's tokens over HTTP; gRPC refuses then, and the usage is told."""
    body = {"model": TINY, "prompt": [5, 6, 7, 8], "max_tokens": GUEST_TOKENS - 10}
    body |= {"ignore_eos": True, "temperature": 0}
    url = f"http://127.0.0.1:{http_port}/v1/completions"
    answer, refused = (
        httpx.post(url, json=body, headers=bearer(keys.guest), timeout=20) for _ in range(2)
    )
    assert (answer.status_code, refused.status_code) == (200, 429)
    assert answer.headers["x-ratelimit-limit-tokens"] == str(GUEST_TOKENS)
    assert 6 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < GUEST_TOKENS // 2
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    with (
        Client(address, retry=None, api_key=keys.guest) as guest,
        pytest.raises(OverloadedError, match="this key's tokens_per_min") as error,
    ):
        guest.generate([5, 6], greedy(GUEST_TOKENS - 10), model=TINY)
    assert error.value.retry_after_s is not None
    [usage] = [key for key in operator.usage().keys if key.name == "guest"]
    # A call that is refused for its tokens was a request, too.
    assert usage == KeyUsage("guest", 3, 4, GUEST_TOKENS - 10, 0, 2)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def listeners(process: subprocess.Popen[bytes]) -> dict[int, set[str]]:
    """Return the ports of Serve's processes and ours, and the addresses where they are open."""
    found: dict[int, set[str]] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(OURS):
                for one in child.net_connections("inet"):
                    if one.status == psutil.CONN_LISTEN:
                        found.setdefault(one.laddr.port, set()).add(one.laddr.ip)
    return found


def shows_strangers_nothing(ports: Collection[int]) -> None:
    """Assert that neither HTTP nor gRPC gives anything away on any port."""
    asked = [(port, path, key) for port in ports for key in (None, "em-canary") for path in PATHS]
    called = [(port, path, key) for port in ports for key in (None, "em-canary") for path in CALLS]
    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(asked, pool.map(lambda one: of_http(*one), asked), strict=True))
        codes = dict(zip(called, pool.map(lambda one: of_grpc(*one), called), strict=True))
    assert not [one for one, status in answers.items() if status == 200]
    assert not [one for one, (code, _) in codes.items() if code is grpc.StatusCode.OK]
    assert sum(status == 401 for status in answers.values()) == len(PATHS) * 2
    refused = [code for code, is_ours in codes.values() if is_ours]
    assert refused == [grpc.StatusCode.UNAUTHENTICATED] * 2 * 2  # for clients, and for operators


def of_http(port: int, path: str, key: str | None) -> int | None:
    """Return the status of an answer, or ``None`` where nobody speaks HTTP."""
    try:
        url = f"http://127.0.0.1:{port}{path}"
        return httpx.get(url, headers=bearer(key), timeout=ASK_S).status_code
    except httpx.HTTPError:
        return None


def of_grpc(port: int, path: str, key: str | None) -> tuple[grpc.StatusCode, bool]:
    """Return the status of an empty call, and whether a gateway gave it."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(path)(
                CALLS[path].SerializeToString(), timeout=ASK_S, metadata=list(bearer(key).items())
            )
        except grpc.RpcError as error:
            metadata = dict(error.trailing_metadata() or ())
            return error.code(), is_from_server(metadata.get(DETAILS_KEY))
    return grpc.StatusCode.OK, True


def answers_owners_over_http(ports: Collection[int], keys: Keys) -> set[int]:
    """Return the ports on which the owner of a key gets the models."""
    key = keys.of[Role.INFERENCE]
    return {port for port in ports if of_http(port, "/v1/models", key) == 200}


def keys_change_under_streams(keys: Keys, address: str) -> None:
    """Assert that streams go on while their key is replaced, and that it then counts no more."""
    old = keys.of[Role.INFERENCE]
    with Client(address, retry=None, api_key=old) as before:
        streams = [StreamReader(before, "In the", greedy(LENGTH), TINY) for _ in range(STREAMS)]
        for stream in streams:
            stream.wait_tokens(1)
        new = keys.of[Role.INFERENCE] = add_key(keys.file, "successor", [Role.INFERENCE])
        with Client(address, retry=None, api_key=new) as after:
            wait_until(lambda: works(after), "the new key counts", LEAVES_S)
            revoke(keys.file, Role.INFERENCE)
            wait_until(lambda: not works(before), "the old key counts no more", LEAVES_S)
            for stream in streams:
                assert len(stream.result()) == LENGTH
            assert works(after)


def works(client: Client) -> bool:
    try:
        return bool(client.model_info())
    except UnauthenticatedError:
        return False


def session_folder(process: subprocess.Popen[bytes]) -> Path:
    """Return the folder in which Ray and Serve keep their logs."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "raylet":
            [word] = [w for w in child.cmdline() if w.startswith("--session_dir=")] or [""]
            return Path(word.partition("=")[2])
    pytest.fail("there is no raylet")


def files_with(folder: Path, secrets: Collection[str]) -> list[Path]:
    """Return the files that have one of the secrets."""
    assert (folder / "logs" / "serve").is_dir()
    wanted = [secret.encode() for secret in secrets]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    return [path for path in files if any(secret in path.read_bytes() for secret in wanted)]
