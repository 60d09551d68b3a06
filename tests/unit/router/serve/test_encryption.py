"""TLS on the ports that Serve opens for clients: the real HAProxy, and Serve's own servers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
import trustme
from ray.serve._private import constants, haproxy, http_util
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray.serve.config import HTTPOptions, gRPCOptions

from benchmarks.shipped import free_ports
from cluster.errors import ConfigError
from router.serve.changed import ServeChangedError
from router.serve.encryption import (
    check_encryption,
    direct_options,
    encrypt_grpc,
    encrypt_http,
    keep_http_behind_haproxy,
    keep_to_machine,
    put_in_force,
)
from router.serve.listening import _close_folder, narrowed_template
from router.serve.options import CALLBACK, NARROW_PROXIES
from tests.client_tls import Pair, shown_number

HOST, LIMIT_S, STREAMS = "127.0.0.1", 30.0, 8
SERVICES = ["router.gateway.grpc.service:add_services_to_server"]
ECHO = "/test.Echo/Say"
HEALTH = "/ray.serve.RayServeAPIService/Healthz"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "tls", asks_clients=True)


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tls.LOOK_S", 0.0)


@pytest.fixture
def behind_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", True)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work()

    asyncio.run(bounded())


class Behind:
    """Servers of HTTP and gRPC that stand for a gateway; a stream ends once it may."""

    def __init__(self) -> None:
        self.may_end = may_end = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                pieces = [b"whole"] if self.path != "/stream" else [b"first", b"last"]
                self.send_response(200)
                self.send_header("content-length", str(sum(map(len, pieces))))
                self.end_headers()
                for i, piece in enumerate(pieces):
                    if i:
                        may_end.wait(LIMIT_S)
                    self.wfile.write(piece)
                    self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        def stream(request: bytes, context: Any) -> Iterator[bytes]:
            yield b"first"
            may_end.wait(LIMIT_S)
            yield b"last"

        def healthy(request: bytes, context: Any) -> bytes:
            return b"\n\x07success"

        self.http = ThreadingHTTPServer((HOST, 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.grpc = grpc.server(ThreadPoolExecutor(STREAMS + 2))
        handlers = {
            ECHO: grpc.unary_stream_rpc_method_handler(stream),
            HEALTH: grpc.unary_unary_rpc_method_handler(healthy),
        }
        self.grpc.add_generic_rpc_handlers((_Handlers(handlers),))
        self.grpc_port = self.grpc.add_insecure_port(f"{HOST}:0")
        self.grpc.start()

    @property
    def http_port(self) -> int:
        return int(self.http.server_address[1])

    def close(self) -> None:
        self.may_end.set()
        self.http.shutdown()
        self.http.server_close()
        self.grpc.stop(None)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: Any) -> Any:
        return self._handlers.get(handler_call_details.method)


@pytest.fixture
def behind() -> Iterator[Behind]:
    servers = Behind()
    yield servers
    servers.close()


class Api(haproxy.HAProxyApi):  # type: ignore[misc, name-defined]
    """Serve's HAProxy with what is replaced in a proxy's process."""


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    template = narrowed_template(HAPROXY_CONFIG_TEMPLATE)
    monkeypatch.setattr(haproxy, "HAPROXY_CONFIG_TEMPLATE", template)
    names = (
        "_initialize_directories_and_error_files",
        "set_backend_configs",
        "set_grpc_fallback_server",
    )
    for name in names:
        monkeypatch.setattr(Api, name, getattr(haproxy.HAProxyApi, name))
    _close_folder(Api)
    keep_to_machine(Api)


def api_of(folder: Path, options: dict[str, str], behind: Behind) -> Any:
    http, grpc_port, metrics, statistics = free_ports(4)
    node = folder / "node"
    config = haproxy.HAProxyConfig(
        http_options=HTTPOptions(host=HOST, port=http, **options),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=SERVICES),
        socket_path=str(node / "admin.sock"),
        server_state_base=str(node),
        server_state_file=str(node / "state"),
        metrics_port=metrics,
        stats_port=statistics,
        metrics_enabled=False,
        is_head=True,
        http_health_check_path="/",
    )
    api = Api(config, config_file_path=str(node / "haproxy.cfg"))
    ports = {RequestProtocol.HTTP: behind.http_port, RequestProtocol.GRPC: behind.grpc_port}
    api.set_backend_configs(
        {
            name: haproxy.BackendConfig(
                name=name,
                path_prefix="/",
                app_name="app",
                protocol=protocol,
                servers=[haproxy.ServerConfig(name="gateway", host=HOST, port=port)],
            )
            for protocol, port in ports.items()
            for name in [f"{protocol.value.lower()}-app"]
        }
    )
    return api


@asynccontextmanager
async def running(api: Any) -> AsyncIterator[tuple[int, int]]:
    """Run HAProxy; returns its ports of HTTP and gRPC."""
    await api.start()
    try:
        yield api.cfg.frontend_port, api.cfg.grpc_frontend_port
    finally:
        await api.stop()


async def status_of(url: str, verify: Any) -> int | None:
    try:
        async with httpx.AsyncClient(verify=verify, timeout=LIMIT_S) as client:
            return (await client.get(url)).status_code
    except (httpx.HTTPError, ssl.SSLError):
        return None


async def pieces_of(
    port: int, tls: Any, began: Callable[[], None] = lambda: None
) -> list[bytes] | None:
    """Return the messages of a stream, or ``None`` where it does not come to its end."""
    address = f"{HOST}:{port}"
    channel = (
        grpc.aio.insecure_channel(address)
        if tls is None
        else grpc.aio.secure_channel(address, tls.credentials())
    )
    async with channel:
        found = []
        try:
            async for piece in channel.unary_stream(ECHO)(b"", timeout=LIMIT_S / 3):
                found.append(piece)
                began()
        except grpc.RpcError:
            return None
        return found


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("asks_clients", [True, False])
def test_haproxy_takes_the_configuration_with_tls(
    tmp_path: Path, behind: Behind, asks_clients: bool
) -> None:
    pair = Pair(tmp_path / "tls", asks_clients)
    api = api_of(tmp_path, pair.http_options(), behind)
    api._generate_config_file_internal()
    command = [haproxy.get_haproxy_binary(), "-c", "-f", api.config_file_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    binds = [
        line for line in Path(api.config_file_path).read_text().splitlines() if " ssl " in line
    ]
    assert len(binds) == 2
    assert all(("verify required" in line) == asks_clients for line in binds)


@pytest.mark.usefixtures("patched")
def test_haproxy_answers_known_clients_by_tls_and_nobody_else(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    behind.may_end.set()
    stranger = Pair(tmp_path / "other")

    async def work() -> None:
        async with running(api_of(tmp_path, pair.http_options(), behind)) as (http, grpc_port):
            url = f"https://{HOST}:{http}/"
            assert await status_of(url, pair.context()) == 200
            assert await status_of(url, pair.context(has_certificate=False)) is None
            assert await status_of(url, stranger.context()) is None
            plain = await status_of(f"http://{HOST}:{http}/", verify=True)
            assert plain is None
            assert await pieces_of(grpc_port, pair.tls()) == [b"first", b"last"]
            assert await pieces_of(grpc_port, pair.tls(has_certificate=False)) is None
            assert await pieces_of(grpc_port, stranger.tls()) is None
            assert await pieces_of(grpc_port, None) is None

    run(work)


@pytest.mark.usefixtures("patched")
def test_haproxy_speaks_no_tls_before_1_2_and_prefers_http_2(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    def negotiated(port: int, version: ssl.TLSVersion) -> tuple[str | None, str | None]:
        context = pair.context()
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection((HOST, port), timeout=LIMIT_S) as raw,
            context.wrap_socket(raw, server_hostname=HOST) as connection,
        ):
            return connection.version(), connection.selected_alpn_protocol()

    async def work() -> None:
        async with running(api_of(tmp_path, pair.http_options(), behind)) as ports:
            for port in ports:
                for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
                    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|UNSUPPORTED"):
                        await asyncio.to_thread(negotiated, port, version)
                for version, name in (
                    (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
                    (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
                ):
                    assert await asyncio.to_thread(negotiated, port, version) == (name, "h2")

    run(work)


@pytest.mark.usefixtures("patched")
def test_a_new_certificate_breaks_no_stream_and_starts_no_process(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    async def work() -> None:
        api = api_of(tmp_path, pair.http_options(), behind)
        async with running(api) as (http, grpc_port), asyncio.TaskGroup() as group:
            pid = await api._get_running_pid()
            begun = asyncio.Semaphore(0)
            calls = [
                group.create_task(pieces_of(grpc_port, pair.tls(), begun.release))
                for _ in range(STREAMS)
            ]
            reads = [
                group.create_task(read_stream(http, pair, begun.release)) for _ in range(STREAMS)
            ]
            for _ in range(2 * STREAMS):
                await begun.acquire()
            number = pair.replace()
            await put_in_force(api)
            for port in (http, grpc_port):
                shown = await asyncio.to_thread(shown_number, HOST, port, pair.context())
                assert shown == number
            assert await api._get_running_pid() == pid
            assert not any(task.done() for task in (*calls, *reads))
            behind.may_end.set()
            assert [await call for call in calls] == [[b"first", b"last"]] * STREAMS
            assert [await read for read in reads] == [b"firstlast"] * STREAMS

    run(work)


async def read_stream(port: int, pair: Pair, began: Callable[[], None]) -> bytes:
    text = b""
    async with (
        httpx.AsyncClient(verify=pair.context(), timeout=LIMIT_S) as client,
        client.stream("GET", f"https://{HOST}:{port}/stream") as answer,
    ):
        async for piece in answer.aiter_raw():
            text += piece
            began()
    return text


@pytest.mark.usefixtures("patched")
def test_a_text_too_long_for_haproxys_commands_comes_into_force_by_a_new_process(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    async def work() -> None:
        api = api_of(tmp_path, pair.http_options(), behind)
        async with running(api) as (http, _), asyncio.TaskGroup() as group:
            pid = await api._get_running_pid()
            begun = asyncio.Event()
            read = group.create_task(read_stream(http, pair, begun.set))
            await begun.wait()
            others = b"".join(certificates_of_others(80))
            Path(pair.authority).write_bytes(pair.ca.cert_pem.bytes() + others)
            await put_in_force(api)
            assert await api._get_running_pid() != pid
            assert await status_of(f"https://{HOST}:{http}/", pair.context()) == 200
            behind.may_end.set()
            assert await read == b"firstlast"

    run(work)


def certificates_of_others(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield trustme.CA().cert_pem.bytes()


@pytest.mark.usefixtures("patched")
def test_clients_of_an_authority_that_was_taken_out_are_refused_however_they_come_back(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    other = Pair(tmp_path / "other")

    def ask(port: int, context: ssl.SSLContext, session: Any) -> tuple[bytes, Any]:
        with (
            socket.create_connection((HOST, port), timeout=LIMIT_S) as raw,
            context.wrap_socket(raw, server_hostname=HOST, session=session) as connection,
        ):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: gateway\r\n\r\n")
            return connection.recv(100), connection.session

    async def work() -> None:
        api = api_of(tmp_path, pair.http_options(), behind)
        versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        contexts = [pair.context() for _ in versions]
        async with running(api) as (http, _):
            for version, context in zip(versions, contexts, strict=True):
                context.maximum_version = version
                pair.ca.cert_pem.write_to_path(pair.authority)
                await put_in_force(api)
                answer, session = await asyncio.to_thread(ask, http, context, None)
                assert b" 200 " in answer, answer
                other.ca.cert_pem.write_to_path(pair.authority)
                await put_in_force(api)
                with pytest.raises(OSError, match=r"alert|reset"):
                    await asyncio.to_thread(ask, http, context, session)

    run(work)


@pytest.mark.usefixtures("patched")
def test_haproxy_with_tls_calls_gateways_of_its_own_machine_alone(
    tmp_path: Path, pair: Pair, behind: Behind
) -> None:
    for options, hosts in ((pair.http_options(), [HOST]), ({}, [HOST, "10.1.2.3"])):
        api = api_of(tmp_path, options, behind)
        servers = [haproxy.ServerConfig("gateway", host, 1) for host in (HOST, "10.1.2.3")]
        backend = haproxy.BackendConfig(
            name="b", path_prefix="/", servers=servers, fallback_server=servers[1]
        )
        api.set_backend_configs({"b": backend})
        api.set_grpc_fallback_server(servers[1])
        assert [server.host for server in api.backend_configs["b"].servers] == hosts
        assert (backend.fallback_server is None) == bool(options)
        assert (api.grpc_fallback_server is None) == bool(options)


@pytest.mark.parametrize(
    ("host", "direct"), [("0.0.0.0", HOST), ("10.1.2.3", HOST), ("::1", "::1")]
)
@pytest.mark.usefixtures("behind_haproxy")
def test_gateways_behind_haproxy_with_tls_listen_on_loopback(
    pair: Pair, host: str, direct: str
) -> None:
    options = HTTPOptions(host=host, **pair.http_options())
    told = direct_options(options)
    assert (told.host, told.ssl_certfile, told.ssl_ca_certs) == (direct, None, None)
    without = HTTPOptions(host=host)
    assert direct_options(without) is without

    async def start(app: Any, http_options: HTTPOptions, **others: Any) -> str:
        return str(http_options.host)

    replica = SimpleNamespace(start_asgi_http_server=start)
    keep_http_behind_haproxy(replica)  # type: ignore[arg-type]
    assert asyncio.run(replica.start_asgi_http_server(None, options)) == direct


def test_serves_own_server_of_http_asks_for_certificates_and_shows_new_ones(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_util, "uvicorn", http_util.uvicorn)
    encrypt_http(http_util)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["scheme"].encode()})

    async def work() -> None:
        [port] = free_ports(1)
        options = HTTPOptions(host=HOST, port=port, middlewares=[], **pair.http_options())
        loop = asyncio.get_running_loop()
        task, server = await http_util.start_asgi_http_server(app, options, event_loop=loop)
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"https://{HOST}:{port}/"
        assert await status_of(url, pair.context()) == 200
        assert await status_of(url, pair.context(has_certificate=False)) is None
        assert await status_of(f"http://{HOST}:{port}/", verify=True) is None
        number = pair.replace()
        assert await asyncio.to_thread(shown_number, HOST, port, pair.context()) == number
        server.should_exit = True
        await task

    run(work)


def test_serves_own_server_of_grpc_has_tls_where_clients_reach_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    server = SimpleNamespace(
        add_insecure_port=lambda address: opened.append(f"plain {address}"),
        add_secure_port=lambda address, credentials: opened.append(f"TLS {address}"),
    )
    module = ModuleType("of_serve")
    module.add_grpc_address = (  # type: ignore[attr-defined]
        lambda server, address: server.add_insecure_port(address)
    )
    options = [HTTPOptions(**pair.http_options()), HTTPOptions()]
    encrypt_grpc(module, lambda: options[0])
    module.add_grpc_address(server, "a:1")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "RAY_SERVE_ENABLE_HA_PROXY", True)
        module.add_grpc_address(server, "a:2")
    options.pop(0)
    module.add_grpc_address(server, "a:3")
    assert opened == ["TLS a:1", "plain a:2", "plain a:3"]


def test_proxies_that_would_answer_in_plain_text_are_refused(pair: Pair) -> None:
    options = HTTPOptions(**pair.http_options())
    check_encryption(options, {CALLBACK: NARROW_PROXIES})
    check_encryption(HTTPOptions(), {})
    with pytest.raises(ConfigError, match=f"ssl_certfile: without {CALLBACK}="):
        check_encryption(options, {})


def test_a_serve_without_the_known_functions_is_refused() -> None:
    for patch in (encrypt_http, keep_http_behind_haproxy):
        with pytest.raises(ServeChangedError, match="of_serve has no"):
            patch(ModuleType("of_serve"))
