"""Clients and the command line over TLS: whom they trust, and the certificate that they show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks.shipped import free_ports
from cluster.errors import ConfigError
from router.cli.app import app
from router.client import AsyncClient, Client, ClientTls, UnreachableError
from router.client.tls import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE
from router.config.listen import ListenConfig
from router.gateway.listen.grpc import Door, GrpcListener
from router.security.certificates import Certificates
from tests.client_tls import Pair
from tests.unit.gateway_fakes import FakeUpstream, Servicer, says

HOST, MAX_MESSAGE_BYTES, LIMIT_S = "127.0.0.1", 1_000_000, 60.0


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "tls", asks_clients=True)


@pytest.fixture
def address(pair: Pair) -> Iterator[str]:
    """Both ports of a gateway that asks for certificates."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> tuple[int, list[GrpcListener]]:
        servicer = Servicer(FakeUpstream(says(" one")))
        certificates = Certificates(pair.files)
        [port] = free_ports(1)
        servers = []
        for methods, on in (
            (servicer.methods.for_clients(), port),
            (servicer.methods.for_operators(), port + 1),
        ):
            door = Door(servicer.access, methods, MAX_MESSAGE_BYTES)
            servers.append(GrpcListener(door, (), ListenConfig(), MAX_MESSAGE_BYTES, certificates))
            await servers[-1].start(HOST, on, "")
        return port, servers

    port, servers = asyncio.run_coroutine_threadsafe(start(), loop).result(LIMIT_S)
    yield f"{HOST}:{port}"
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(0.0), loop).result(LIMIT_S)
    loop.call_soon_threadsafe(loop.stop)


def test_the_right_certificates_reach_both_ports(address: str, pair: Pair) -> None:
    async def ask() -> str:
        async with AsyncClient(address, tls=pair.tls(), retry=None) as client:
            [reply] = await client.generate("in", model="tiny")
            await client.status()
            return reply.text

    with Client(address, tls=pair.tls(), retry=None) as client:
        [reply] = client.generate("in", model="tiny")
        assert reply.text == " one"
        assert client.status().models
    assert asyncio.run(ask()) == " one"


def test_others_are_not_answered(address: str, pair: Pair, tmp_path: Path) -> None:
    stranger = Pair(tmp_path / "other")
    for tls in (None, pair.tls(has_certificate=False), stranger.tls()):
        with Client(address, tls=tls, retry=None) as client:
            with pytest.raises(UnreachableError, match="no ExpertMesh server answers"):
                client.model_info()
            with pytest.raises(UnreachableError, match="where gateways answer operators"):
                client.status()


def test_an_unknown_authority_is_said(address: str, tmp_path: Path) -> None:
    with (
        Client(address, tls=Pair(tmp_path / "other").tls(), retry=None) as client,
        pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.model_info()


def run(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def test_the_command_line_takes_files_or_variables(
    address: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", "in", "--model", "tiny", "--address", address)
    options = ("--tls-ca", pair.authority, "--tls-cert", pair.client, "--tls-key", pair.client_key)
    assert run(*options, *words).output == " one\n"
    assert run(*words).exit_code == 3  # an option holds for one command
    monkeypatch.setenv(AUTHORITY_VARIABLE, pair.authority)
    assert run(*words).exit_code == 3
    monkeypatch.setenv(CERTIFICATE_VARIABLE, pair.client)
    monkeypatch.setenv(KEY_VARIABLE, pair.client_key)
    assert run(*words).output == " one\n"


def test_half_of_what_tls_needs_is_refused(pair: Pair) -> None:
    done = run("--tls-cert", pair.client, "--tls-key", pair.client_key, "generate", "in")
    assert done.exit_code == 2
    assert "EXPERTMESH_TLS_CA: missing: TLS needs the authority of the server" in done.output
    done = run("--tls-ca", pair.authority, "--tls-cert", pair.client, "generate", "in")
    assert done.exit_code == 2
    assert "a client's certificate and its key need each other" in done.output
    with pytest.raises(ConfigError, match="no-such-file cannot be read: No such file"):
        Client(tls=ClientTls("no-such-file"))
