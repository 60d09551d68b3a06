"""A gateway's own gRPC server: it answers, waits for its port, and ends without losing a call."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.shipped import free_ports
from cluster.errors import ExpertMeshError
from router.client import ClientTls, Sampling, UnreachableError
from router.client.aio import AsyncClient
from router.gateway.grpc.server import CLIENTS, GrpcServer
from router.messages.request import GenerationRequest, TokenEvent
from router.security.certificates import Certificates
from tests.client_tls import Pair
from tests.unit.gateway_fakes import FakeUpstream, Servicer, says

HOST = "127.0.0.1"
LIMIT_S = 20.0
MAX_MESSAGE_BYTES = 10_000_000
SAMPLING = Sampling(max_tokens=4, temperature=0.0)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work()

    asyncio.run(bounded())


def server_of(text: str, port: int, host: str = HOST) -> GrpcServer:
    servicer = Servicer(FakeUpstream(says(text)))
    return GrpcServer(servicer, CLIENTS, host, port, MAX_MESSAGE_BYTES)


async def answer_of(port: int, host: str = HOST) -> str:
    async with AsyncClient(f"{host}:{port}", retry=None) as client:
        [reply] = await client.generate("in", SAMPLING, model="tiny")
        return reply.text


@pytest.mark.parametrize(("host", "asked"), [(HOST, HOST), ("0.0.0.0", HOST), ("::1", "[::1]")])
def test_it_answers_on_its_port_and_not_once_it_has_stopped(host: str, asked: str) -> None:
    async def work() -> None:
        [port] = free_ports(1)
        server = server_of(" one", port, host)
        server.start()
        await server.wait_listening()
        assert await answer_of(port, asked) == " one"
        await server.stop(0.0)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host.strip("[]"), port)

    run(work)


def test_a_second_gateway_of_the_machine_takes_over_when_the_first_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        [port] = free_ports(1)
        first, second = server_of(" one", port), server_of(" two", port)
        first.start()
        await first.wait_listening()
        second.start()
        for _ in range(3):
            assert await answer_of(port) == " one"
        await first.stop(0.0)
        await second.wait_listening()
        assert await answer_of(port) == " two"
        await second.stop(0.0)

    with caplog.at_level(logging.INFO, "expertmesh.gateway"):
        run(work)
    waits = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(waits) == 1
    assert "cannot be opened (Address already in use)" in waits[0].getMessage()
    assert "this gateway answers there once it is free" in waits[0].getMessage()


def test_a_port_of_another_program_is_said_and_waited_for(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        with socket.create_server((HOST, 0)) as other:
            port = other.getsockname()[1]
            server = server_of(" one", port)
            server.start()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await server.wait_listening()
        await server.wait_listening()
        assert await answer_of(port) == " one"
        await server.stop(0.0)

    with caplog.at_level(logging.INFO, "expertmesh.gateway"):
        run(work)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "Failed to" not in capfd.readouterr().err  # gRPC's own line, at every attempt


def test_one_that_still_waits_can_be_stopped() -> None:
    async def work() -> None:
        with socket.create_server((HOST, 0)) as other:
            server = server_of(" one", other.getsockname()[1])
            server.start()
            await asyncio.sleep(0)
            await server.stop(0.0)

    run(work)


class HeldUpstream(FakeUpstream):
    """One that answers no request before ``goes_on`` is set."""

    def __init__(self, text: str) -> None:
        super().__init__(says(text))
        self.is_asked, self.goes_on = asyncio.Event(), asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.is_asked.set()
        await self.goes_on.wait()
        async for event in super().generate(request):
            yield event


def test_a_call_under_way_is_finished_while_new_ones_go_elsewhere() -> None:
    async def work() -> None:
        [port] = free_ports(1)
        upstream = HeldUpstream(" one")
        first, second = (
            GrpcServer(Servicer(upstream), CLIENTS, HOST, port, MAX_MESSAGE_BYTES),
            server_of(" two", port),
        )
        first.start()
        await first.wait_listening()
        call = asyncio.create_task(answer_of(port))
        await upstream.is_asked.wait()
        stopping = asyncio.create_task(first.stop(LIMIT_S))
        second.start()
        await second.wait_listening()
        assert await answer_of(port) == " two"
        assert not stopping.done()
        upstream.goes_on.set()
        assert await call == " one"
        await stopping
        await second.stop(0.0)

    run(work)


def test_a_message_is_refused_by_name_and_a_far_longer_one_by_grpc() -> None:
    async def work() -> None:
        [port] = free_ports(1)
        server = server_of(" one", port)
        server.start()
        await server.wait_listening()
        async with AsyncClient(f"{HOST}:{port}", retry=None) as client:
            with pytest.raises(ExpertMeshError, match="over the limit of 4194304 bytes"):
                await client.generate("x" * 5_000_000, SAMPLING, model="tiny")
            with pytest.raises(ExpertMeshError, match="larger than max"):
                await client.generate("x" * 11_000_000, SAMPLING, model="tiny")
        await server.stop(0.0)

    run(work)


def test_a_server_that_cannot_start_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(servicer: object, server: object) -> None:
        raise RuntimeError("no such service")

    async def work() -> None:
        servicer = Servicer(FakeUpstream(says(" one")))
        surface = replace(CLIENTS, add=fails)
        server = GrpcServer(servicer, surface, HOST, free_ports(1)[0], MAX_MESSAGE_BYTES)
        server.start()
        with pytest.raises(RuntimeError, match="no such service"):
            await server.wait_listening()
        await server.stop(0.0)

    run(work)
    assert "gRPC: the server cannot start" in caplog.text
    assert "no such service" in caplog.text


def test_with_credentials_it_answers_by_tls_alone(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "tls", asks_clients=True)

    async def ask(port: int, tls: ClientTls | None) -> str:
        async with AsyncClient(f"{HOST}:{port}", retry=None, tls=tls) as client:
            [reply] = await client.generate("in", SAMPLING, model="tiny")
            return reply.text

    async def work() -> None:
        [port] = free_ports(1)
        certificates = Certificates(pair.files)
        servicer = Servicer(FakeUpstream(says(" one")))
        server = GrpcServer(servicer, CLIENTS, HOST, port, MAX_MESSAGE_BYTES, certificates)
        server.start()
        await server.wait_listening()
        assert await ask(port, pair.tls()) == " one"
        for tls in (None, pair.tls(has_certificate=False)):
            with pytest.raises(UnreachableError):
                await ask(port, tls)
        await server.stop(0.0)

    run(work)
