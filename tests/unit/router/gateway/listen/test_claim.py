"""Which application has a port, and how gateways of one application share its sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from benchmarks.shipped import free_ports
from cluster.errors import ConfigError
from router.gateway.listen import claim as module
from router.gateway.listen.claim import Claim, claim
from tests.unit.router.gateway.listen.loops import in_loop

HOST = "127.0.0.1"


def listening(port: int) -> Callable[[], list[socket.socket]]:
    return lambda: [socket.create_server((HOST, port), backlog=16)]


def none_made() -> list[socket.socket]:
    raise AssertionError("the sockets are there already")


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


async def accepted(one: Claim) -> bytes:
    loop = asyncio.get_running_loop()
    peer, _ = await loop.sock_accept(one.sockets[0])
    with peer:
        peer.setblocking(False)
        return await loop.sock_recv(peer, 16)


@in_loop
async def test_what_waits_to_be_accepted_outlives_its_gateway(port: int) -> None:
    first = await claim(HOST, port, "app", listening(port))
    others = [await claim(HOST, port, "app", none_made) for _ in range(2)]
    with socket.create_connection((HOST, port)) as client:
        client.sendall(b"early")
        first.close()
        assert await accepted(others[0]) == b"early"
    others[0].close()
    last = await claim(HOST, port, "app", none_made)  # of the only one that is left
    others[1].close()
    with socket.create_connection((HOST, port)) as client:
        client.sendall(b"late")
        assert await accepted(last) == b"late"
    last.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))


@in_loop
async def test_gateways_that_start_together_have_one_socket(port: int) -> None:
    made = []

    def make() -> list[socket.socket]:
        made.extend(listening(port)())
        return made

    claims = await asyncio.gather(*(claim(HOST, port, "app", make) for _ in range(5)))
    assert len(made) == 1
    assert {one.sockets[0].getsockname() for one in claims} == {(HOST, port)}
    for one in claims:
        one.close()


HOLDER = f"""
import asyncio, socket, sys
from router.gateway.listen.claim import claim

async def hold(port):
    await claim("{HOST}", port, "app", lambda: [socket.create_server(("{HOST}", port))])
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(hold(int(sys.argv[1])))
"""


@contextmanager
def holding(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with a claim on the port, until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder


@in_loop
async def test_a_gateway_that_hangs_is_told_and_one_that_ends_gives_its_place(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    with holding(port) as holder:
        holder.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(module, "CLAIM_TIMEOUT_S", 0.5)
        with pytest.raises(ConfigError, match=rf"port {port} .* did not answer within 0.5 s"):
            await claim(HOST, port, "app", none_made)
        monkeypatch.undo()
        waiting = asyncio.create_task(claim(HOST, port, "app", listening(port)))
        await asyncio.sleep(0)
        holder.kill()
    (await waiting).close()


@in_loop
async def test_strangers_are_not_told_and_not_believed(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    first = await claim(HOST, port, "app", listening(port))
    monkeypatch.setattr(module, "uid_of", lambda peer: os.getuid() + 1)
    with pytest.raises(ConfigError, match="held by another user's process"):
        await claim(HOST, port, "app", none_made)
    name = f"\0expertmesh-{os.getuid()}-{HOST}:{port}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(name)
        stranger.setblocking(False)
        told = b""
        with suppress(ConnectionError):  # the holder may be gone before anything is sent
            stranger.sendall(b"app")
            told = await asyncio.get_running_loop().sock_recv(stranger, 16)
        assert told == b""
    first.close()


@in_loop
async def test_a_silent_peer_delays_only_the_next(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.2)
    first = await claim(HOST, port, "app", listening(port))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(f"\0expertmesh-{os.getuid()}-{HOST}:{port}")
        (await claim(HOST, port, "app", none_made)).close()
    first.close()
