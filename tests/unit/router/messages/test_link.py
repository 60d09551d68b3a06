"""The handshake of links: the secret is proved, by each side, and never sent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from cluster.transport.stream import sockets
from router.messages import link as link_module
from router.messages.link import LinkAddress, LinkListener, open_link
from tests.unit.certificates import new_authority
from tests.unit.router.messages.handshakes import (
    LIMIT_S,
    by_tcp,
    calls,
    connect,
    frame,
    framed,
    happens,
    looped,
    packed,
    proved,
)

SAID = b"said"
SAME, OTHER = "node", "other node"
NODES = pytest.mark.parametrize("node", [SAME, OTHER])


class Echo:
    """A listener that sends back what it reads, and the connections that it was handed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.served = 0
        self.listener = LinkListener(SAME, "127.0.0.1", self._serve, tls)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served += 1
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()


@asynccontextmanager
async def echo(
    tls: ssl.SSLContext | None = None, node: str = OTHER
) -> AsyncIterator[tuple[Echo, LinkAddress]]:
    """An echo, and its address as a peer of a node sees it."""
    made = Echo(tls)
    made.listener.expect(node)
    try:
        yield made, made.listener.start().seen_from(node)
    finally:
        made.listener.close()


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Wait for the end of a connection; returns what still came."""
    came = b""
    async with asyncio.timeout(LIMIT_S):
        try:
            while piece := await reader.read(1 << 16):
                came += piece
        except ConnectionError:
            pass
    return came


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Check that a connection serves."""
    writer.write(SAID)
    assert await asyncio.wait_for(reader.readexactly(len(SAID)), LIMIT_S) == SAID
    writer.close()


@pytest.mark.usefixtures("both_loops")
@NODES
@looped
async def test_a_client_of_the_protocol_is_served_and_the_secret_never_travels(node: str) -> None:
    async with echo(node=node) as (_, address):
        seen = []
        for _ in range(2):
            reader, writer = await connect(address)
            sent, came = await calls(reader, writer, address.secret.encode())
            await answers(reader, writer)
            assert address.secret.encode() not in sent + came
            assert bytes.fromhex(address.secret) not in sent + came
            seen.append(came)
        assert seen[0] != seen[1]


@NODES
@looped
async def test_a_recorded_handshake_is_refused(node: str) -> None:
    async with echo(node=node) as (served, address):
        reader, writer = await connect(address)
        recorded, _ = await calls(reader, writer, address.secret.encode())
        await answers(reader, writer)
        reader, writer = await connect(address)
        await frame(reader)
        writer.write(recorded + SAID)
        assert await ends(reader) == b""
        assert served.served == 1
        writer.close()


NONCE = b"\x02" * 16
Hello = Callable[[bytes, bytes], object]
HELLOS: dict[str, Hello | bytes] = {
    "another secret": lambda secret, nonce: [NONCE, proved(b"x", b"link caller", nonce, NONCE)],
    "another side": lambda secret, nonce: [NONCE, proved(secret, b"router", nonce, NONCE)],
    "swapped": lambda secret, nonce: [NONCE, proved(secret, b"link caller", NONCE, nonce)],
    "the listener's": lambda secret, nonce: [NONCE, proved(secret, b"link listener", nonce, NONCE)],
    "zeros": lambda secret, nonce: [nonce, bytes(32)],
    "no proof": lambda secret, nonce: [NONCE, b""],
    "no nonce": lambda secret, nonce: [b"", proved(secret, b"link caller", nonce, b"")],
    "one part": lambda secret, nonce: [NONCE],
    "no part": lambda secret, nonce: [],
    "nothing": lambda secret, nonce: [None, None],
    "the secret": lambda secret, nonce: [secret.decode()],  # as it was sent once
    "a long nonce": lambda secret, nonce: [NONCE * 100, bytes(32)],
    "a mapping": lambda secret, nonce: {"nonce": NONCE},
    "no msgpack": packed(b"\xc1"),
    "no body": packed(b""),
    "no frame": b"\xff" * 12,
    "a long frame": packed(b"", 0xFFFFFFFF),
    "more than a hello": packed(bytes(link_module.MAX_HELLO_BYTES + 1)),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@NODES
@pytest.mark.parametrize("hello", HELLOS.values(), ids=HELLOS)
@looped
async def test_a_wrong_or_missing_proof_ends_the_connection_without_effect(
    hello: Hello | bytes, node: str
) -> None:
    async with echo(node=node) as (served, address):
        reader, writer = await connect(address)
        [nonce] = await frame(reader)
        sent = hello if isinstance(hello, bytes) else framed(hello(address.secret.encode(), nonce))
        writer.write(sent + SAID)
        assert await ends(reader) == b""
        assert served.served == 0
        writer.close()
        await answers(*await open_link(address, None))  # others are served


@pytest.mark.usefixtures("both_loops")
@NODES
@pytest.mark.parametrize("begun", [b"", framed([NONCE, bytes(32)])[:-1]])
@looped
async def test_a_stranger_that_does_not_end_its_handshake_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, begun: bytes, node: str
) -> None:
    monkeypatch.setattr(link_module, "HELLO_TIMEOUT_S", 0.05)

    async with echo(node=node) as (served, address):
        reader, writer = await connect(address)
        writer.write(begun)
        await frame(reader)
        assert await ends(reader) == b""
        assert served.served == 0
        assert not served.listener._greeting
        writer.close()


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("has_tls", [False, True])
@looped
async def test_handshakes_that_do_not_end_are_few_and_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_tls: bool
) -> None:
    monkeypatch.setattr(link_module, "MAX_GREETING", 4)
    ours = new_authority(tmp_path / "ours") if has_tls else None

    async with echo(None if ours is None else ours.server) as (served, address):
        link = await open_link(address, None if ours is None else ours.client)
        strangers = [await connect(address) for _ in range(12)]
        for reader, _ in strangers[:8]:  # the oldest
            await ends(reader)
        assert len(served.listener._greeting) == 4
        await answers(*await open_link(address, None if ours is None else ours.client))
        await answers(*link)  # one that has ended its handshake stays
        assert served.served == 2
        for _, writer in strangers:
            writer.close()


@NODES
@looped
async def test_a_closed_listener_takes_nobody_and_lets_its_connections_go_on(node: str) -> None:
    async with echo(node=node) as (served, address):
        link = await open_link(address, None)
        greeting, writer = await connect(address)
        await frame(greeting)
        served.listener.close()
        await ends(greeting)
        with pytest.raises(ConnectionRefusedError):
            await open_link(address, None)
        served.listener.expect("a third node")
        assert served.listener.start().seen_from(node) == address  # nothing is opened anew
        await answers(*link)
        writer.close()


def listening() -> list[tuple[str, int]]:
    """Return the addresses at which this process listens by TCP."""
    found = psutil.Process().net_connections("inet")
    return sorted(one.laddr for one in found if one.status == psutil.CONN_LISTEN)


def is_unix(writer: asyncio.StreamWriter) -> bool:
    return bool(writer.get_extra_info("socket").family == socket.AF_UNIX)


@pytest.mark.usefixtures("both_loops")
@looped
async def test_links_are_unix_and_nothing_listens_by_tcp_before_another_node_is_known() -> None:
    before = listening()
    async with echo(node=SAME) as (served, address):
        reader, writer = await open_link(address, None)
        assert is_unix(writer)
        assert (str(address), address.port) == ("unix", 0)
        await answers(reader, writer)
        assert listening() == before
        alone = served.listener.start().seen_from(OTHER)
        assert not alone.is_reachable
        with pytest.raises(ConnectionRefusedError, match="only for its own node"):
            await open_link(alone, None)

        served.listener.expect(OTHER)
        assert listening() == before
        there = served.listener.start().seen_from(OTHER)
        assert listening() == sorted([*before, ("127.0.0.1", there.port)])
        assert str(there) == f"127.0.0.1:{there.port}"
        reader, writer = await open_link(there, None)
        assert not is_unix(writer)
        await answers(reader, writer)
        assert served.listener.start().seen_from(SAME) == address  # and so no second link
        assert served.listener.start().seen_from(OTHER) == there
    await happens(lambda: listening() == before)


def test_an_address_travels_as_plain_data_and_shows_no_secret() -> None:
    address = LinkAddress(SAME, "top secret", b"\0name", "::1", 7)
    assert LinkAddress.from_wire(msgpack.unpackb(msgpack.packb(address.to_wire()))) == address
    assert "top secret" not in f"{address} {address!r}"


@NODES
@looped
async def test_a_wrong_secret_is_refused(node: str) -> None:
    async with echo(node=node) as (served, address):
        with pytest.raises((ConnectionError, EOFError)):
            await open_link(replace(address, secret="0" * 64), None)
        assert served.served == 0
        await answers(*await open_link(address, None))


@pytest.mark.usefixtures("both_loops")
@looped
async def test_with_tls_the_unix_link_stays_plain_and_the_one_by_tcp_is_encrypted(
    tmp_path: Path,
) -> None:
    ours = new_authority(tmp_path / "ours")
    for node in (SAME, OTHER):
        async with echo(ours.server, node) as (_, address):
            reader, writer = await open_link(address, ours.client)
            assert (writer.get_extra_info("ssl_object") is not None) == (node == OTHER)
            await answers(reader, writer)
            reader, writer = await connect(address)
            if node == SAME:
                await calls(reader, writer, address.secret.encode())  # in plain bytes
                await answers(reader, writer)
            else:
                writer.write(framed([NONCE, bytes(32)]))
                assert not (await ends(reader)).startswith(b"\0\0\0")  # an alert, no frame
                writer.close()


@looped
async def test_a_host_that_nobody_may_reach_has_no_port_for_other_nodes() -> None:
    before = listening()
    listener = LinkListener(SAME, None, Echo()._serve, None)
    listener.expect(OTHER)
    assert not listener.start().seen_from(OTHER).is_reachable
    assert listener.start().seen_from(SAME).is_reachable
    assert listening() == before
    listener.close()


@NODES
@looped
async def test_without_unix_sockets_every_link_is_tcp(
    node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (link_module, sockets):
        monkeypatch.setattr(module, "HAS_UNIX", False)

    monkeypatch.delattr(socket, "AF_UNIX")  # the event loop itself needed it
    async with echo(node=node) as (_, address):
        assert (address.name, bool(address.port)) == (b"", True)
        await answers(*await open_link(address, None))


async def _proves_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(framed([NONCE]))
    await frame(reader)
    writer.write(framed([bytes(32)]))
    assert await ends(reader) == b""


async def _says_what_it_heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(framed([NONCE]))
    _, proof = await frame(reader)
    writer.write(framed([proof]))
    assert await ends(reader) == b""


async def _says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await ends(reader) == b""


async def _leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def _speaks_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    "impostor", [_proves_nothing, _says_what_it_heard, _says_nothing, _leaves, _speaks_http]
)
@looped
async def test_an_impostor_that_listens_gets_neither_the_secret_nor_a_message(
    monkeypatch: pytest.MonkeyPatch, impostor: Any
) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.2)

    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await impostor(reader, writer)
        writer.close()
        ended.set_result(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = by_tcp(server.sockets[0].getsockname()[1], "s" * 64)
    with pytest.raises((ConnectionError, TimeoutError)):
        await open_link(address, None)
    await asyncio.wait_for(ended, LIMIT_S)  # and no assertion in it has failed
    server.close()


@pytest.mark.usefixtures("both_loops")
@looped
async def test_over_tls_both_need_a_certificate_of_the_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (new_authority(tmp_path / name) for name in ("ours", "theirs"))
    async with echo(ours.server) as (served, address):
        await answers(*await open_link(address, ours.client))
        with pytest.raises(ssl.SSLCertVerificationError):
            await open_link(address, theirs.client)
        monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.2)  # each waits for the other
        with pytest.raises(TimeoutError):
            await open_link(address, None)
        assert served.served == 1
