"""The certificate that clients see: refused by name where it is of no use, and followed."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from starlette.responses import PlainTextResponse

from cluster.errors import ConfigError
from router.client import ClientTls
from router.config.listen import ListenConfig
from router.gateway.listen.claim import open_socket
from router.gateway.listen.http import HttpListener
from router.security.certificates import Certificates
from tests.client_tls import Pair, shown_number

HOST = "127.0.0.1"
PAST = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "tls", asks_clients=True)


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tls.LOOK_S", 0.0)


UNUSABLE: list[tuple[Callable[[Pair], object], str]] = [
    (
        lambda pair: trustme.CA().issue_cert("x").private_key_pem.write_to_path(pair.key),
        r"certificate: .*server\.pem does not fit its key, .*key\.pem",
    ),
    (
        lambda pair: pair.replace(ends_at=PAST),
        r"certificate: .*server\.pem is refused by TLS: certificate has expired",
    ),
    (
        lambda pair: Path(pair.server).write_text("no certificate"),
        r"certificate: cannot be used",
    ),
    (lambda pair: Path(pair.key).unlink(), r"key: .*key\.pem cannot be read: No such file"),
    (
        lambda pair: shutil.copy(pair.server, pair.authority),
        r"client_authority: .*ca\.pem has no certificate of an authority",
    ),
]


@pytest.mark.parametrize(("spoil", "reason"), UNUSABLE)
def test_files_of_no_use_are_refused_by_name(
    pair: Pair, spoil: Callable[[Pair], object], reason: str
) -> None:
    pair.files.read()
    spoil(pair)
    with pytest.raises(ConfigError, match=rf"^gateway\.listen\.tls\.{reason}"):
        pair.files.read()


@pytest.mark.usefixtures("looks_at_once")
def test_unusable_files_are_a_problem_until_they_are_mended(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    followed = Certificates(pair.files)
    first = followed.current()
    pair.replace(ends_at=PAST)
    with caplog.at_level(logging.ERROR):
        assert followed.current() is first
        assert followed.current() is first
    assert "certificate has expired" in followed.problem
    [record] = caplog.records
    assert "the previous TLS files stay in force" in record.getMessage()
    pair.replace()
    assert followed.current() is not first
    assert followed.problem == ""


@contextmanager
def grpc_server(pair: Pair) -> Iterator[int]:
    """Serve a method that answers with its request."""
    server = grpc.server(ThreadPoolExecutor(2))
    echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_registered_method_handlers("test.Echo", {"Say": echo})
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Say": echo}),)
    )
    port = server.add_secure_port(f"{HOST}:0", Certificates(pair.files).grpc_credentials())
    server.start()
    yield port
    server.stop(None)


def says(port: int, tls: ClientTls | None) -> bool:
    address = f"{HOST}:{port}"
    with (
        grpc.insecure_channel(address)
        if tls is None
        else grpc.secure_channel(address, tls.credentials())
    ) as channel:
        try:
            return bool(channel.unary_unary("/test.Echo/Say")(b"hello", timeout=3) == b"hello")
        except grpc.RpcError:
            return False


@pytest.mark.usefixtures("looks_at_once")
def test_grpc_answers_a_known_client_and_shows_each_new_certificate(
    pair: Pair, tmp_path: Path
) -> None:
    stranger = Pair(tmp_path / "other")
    with grpc_server(pair) as port:
        assert says(port, pair.tls())
        assert not says(port, None)
        assert not says(port, pair.tls(has_certificate=False))
        assert not says(port, stranger.tls())
        assert not says(port, ClientTls(pair.authority, stranger.client, stranger.client_key))
        number = pair.replace()
        context = pair.context()
        context.set_alpn_protocols(["h2"])
        assert shown_number(HOST, port, context) == number
        stranger.ca.cert_pem.write_to_path(pair.authority)  # the clients' authority is another
        assert not says(port, ClientTls(stranger.authority, pair.client, pair.client_key))


@pytest.mark.usefixtures("looks_at_once")
async def test_an_http_port_shows_each_new_certificate_and_keeps_its_connections(
    pair: Pair,
) -> None:
    certificates = Certificates(pair.files)
    listening = open_socket(HOST, 0, "http_port", listens=True)
    port = listening.getsockname()[1]
    url = f"https://{HOST}:{port}/"
    listener = HttpListener(
        PlainTextResponse("here"),
        [listening],
        listening.close,
        ListenConfig(),
        lambda: certificates.current().context,
    )
    listener.start()

    async def connection_of(client: httpx.AsyncClient) -> object:
        answer = await client.get(url)
        assert answer.text == "here"
        return answer.extensions["network_stream"].get_extra_info("client_addr")

    async with httpx.AsyncClient(verify=pair.context()) as client:
        before = await connection_of(client)
        number = pair.replace()
        assert await asyncio.to_thread(shown_number, HOST, port, pair.context()) == number
        assert await connection_of(client) == before
    async with httpx.AsyncClient(verify=pair.context(has_certificate=False)) as stranger:
        with pytest.raises(httpx.TransportError):
            await stranger.get(url)
    await listener.stop(0.0)
    listening.close()
