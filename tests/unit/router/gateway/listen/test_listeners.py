"""All ports of a gateway: shared with its like, refused to others, and closed behind requests."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_reflection.v1alpha import reflection_pb2
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from benchmarks.shipped import free_ports
from cluster.errors import ConfigError, ExpertMeshError
from router.client import ClientTls, Sampling, UnreachableError, session
from router.client.aio import AsyncClient
from router.config.listen import ListenConfig
from router.gateway.grpc.call import Method
from router.gateway.grpc.methods import ADMIN_SERVICE, SERVICES
from router.gateway.limits import room as limits
from router.gateway.listen import listeners
from router.gateway.listen.grpc import MAX_STREAMS, Door, GrpcListener
from router.gateway.listen.listeners import Listeners, Surface
from router.gateway.metrics import Metrics
from router.messages.request import GenerationRequest, TokenEvent
from router.security.access import FIELD, Access
from router.security.certificates import Certificates
from router.security.keyring import Keyring
from router.security.keys import Caller, Role
from router.security.keys_file import add_key
from tests.client_tls import Pair
from tests.unit.gateway_fakes import FakeUpstream, Servicer, everybody, says
from tests.unit.router.gateway.listen.loops import LIMIT_S, in_loop, until

HOST, MAX_BODY_BYTES, MIB = "127.0.0.1", 4 << 20, 1 << 20
PORTS = ("http_port", "grpc_port", "admin_port", "health_port")
SAMPLING = Sampling(max_tokens=4, temperature=0.0)


class Named:
    """An HTTP app that answers with its name, and counts the answers."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.count += 1
        await PlainTextResponse(self.name)(scope, receive, send)

    async def answers(self, more: int) -> None:
        wanted = self.count + more
        await until(lambda: self.count >= wanted)


class Gateway:
    """The listeners of a gateway that answers with its name everywhere."""

    def __init__(
        self,
        listen: ListenConfig,
        name: str = "one",
        upstream: FakeUpstream | None = None,
        access: Access | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.app = Named(name)
        self.upstream = upstream or FakeUpstream(says(f" {name}"))
        servicer = Servicer(self.upstream, access=access)
        self.listeners = Listeners(
            listen,
            self.app,
            Surface(servicer.methods.for_clients(), SERVICES),
            Surface(servicer.methods.for_operators(), (ADMIN_SERVICE.full_name,)),
            servicer.access,
            max_body_bytes,
            None if listen.tls is None else Certificates(listen.tls.files()),
        )


def own_ports(host: str = HOST, **others: Any) -> ListenConfig:
    """Return a section with free ports; operators' comes after gRPC's, where clients look."""
    http_port, grpc_port, health_port = free_ports(3)
    return ListenConfig(
        host=host,
        admin_host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        admin_port=grpc_port + 1,
        health_port=health_port,
    ).model_copy(update=others)


@pytest.fixture(autouse=True)
def clients_share_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*session.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    monkeypatch.setattr(session, "CHANNEL_OPTIONS", options)


@asynccontextmanager
async def opened(*gateways: Gateway, application: str = "app") -> AsyncIterator[None]:
    try:
        for one in gateways:
            await one.listeners.open(application)
        yield
    finally:
        for one in gateways:
            await one.listeners.close(0.0)


async def generated(port: int, host: str = HOST, tls: ClientTls | None = None) -> str:
    """Return what a gateway says, on a connection of its own."""
    async with AsyncClient(f"{host}:{port}", retry=None, tls=tls) as client:
        [reply] = await client.generate("in", SAMPLING, model="tiny")
        return reply.text


async def status_asked(port: int, host: str = HOST) -> None:
    """Ask the operators' port, which comes after this one."""
    async with AsyncClient(f"{host}:{port}", retry=None) as client:
        await client.status()


async def fetched(port: int, path: str = "/", host: str = HOST) -> str:
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        return (await client.get(f"http://{host}:{port}{path}")).text


def check_free(listen: ListenConfig, apart_from: str = "") -> None:
    """Bind all ports of a section, alone and without any option."""
    for key, port in listen.ports().items():
        if key != apart_from:
            host = listen.host_of(key)
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
                one.bind((host, port))


def connections_on(port: int, status: str) -> int:
    """Return how many sockets of this process have a local port, as the system tells it."""
    all_of_them = psutil.Process().net_connections(kind="tcp")
    return sum(one.laddr.port == port and one.status == status for one in all_of_them if one.laddr)


@pytest.mark.parametrize(("host", "asked"), [(HOST, HOST), ("0.0.0.0", HOST), ("::1", "[::1]")])
@in_loop
async def test_it_answers_on_its_ports_and_not_once_it_has_closed(host: str, asked: str) -> None:
    listen = own_ports(host)
    gateway = Gateway(listen)
    async with opened(gateway):
        assert await fetched(listen.http_port, host=asked) == "one"
        assert await generated(listen.grpc_port, asked) == " one"
        await status_asked(listen.grpc_port, asked)
        assert gateway.upstream.controller.calls
    for key, port in listen.ports().items():
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(listen.host_of(key).replace("0.0.0.0", HOST), port)


@in_loop
async def test_gateways_of_one_application_share_all_ports_and_each_answers() -> None:
    listen = own_ports()
    both = [Gateway(listen, name) for name in ("one", "two")]
    async with opened(*both):
        while not all(gateway.app.count for gateway in both):
            await asyncio.gather(*(fetched(listen.http_port) for _ in range(8)))
        while not all(gateway.upstream.requests for gateway in both):
            assert await generated(listen.grpc_port) in (" one", " two")
        while not all(gateway.upstream.controller.calls for gateway in both):
            await status_asked(listen.grpc_port)
        assert listen.health_port is not None
        assert await fetched(listen.health_port, "/-/healthz") == "success"


def answers_until(port: int, is_over: threading.Event, keeps: bool) -> Counter[str]:
    """Return how often each gateway has answered; every request is sent once."""
    told: Counter[str] = Counter()
    connection = http.client.HTTPConnection(HOST, port, timeout=LIMIT_S)
    while not is_over.is_set():
        connection.request("GET", "/")
        told[connection.getresponse().read().decode()] += 1
        if not keeps:
            connection.close()
    connection.close()
    return told


@asynccontextmanager
async def asked_meanwhile(
    first: Gateway, ask: Callable[[int, threading.Event, bool], Counter[str]], port: int
) -> AsyncIterator[tuple[AsyncExitStack, Counter[str]]]:
    """Ask from eight threads, half of which keep their connections; the end has what was told."""
    is_over, told = threading.Event(), Counter[str]()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(opened(first))
        calls = [asyncio.to_thread(ask, port, is_over, keeps) for keeps in (True, False) * 4]
        callers = [asyncio.create_task(call) for call in calls]
        try:
            yield stack, told
        finally:
            is_over.set()
        for each in await asyncio.gather(*callers):
            told.update(each)


@in_loop
async def test_no_request_fails_while_gateways_are_replaced() -> None:
    """The clients have kept connections and new ones, and send no request again."""
    listen = own_ports()
    gateways = [Gateway(listen, str(number)) for number in range(6)]
    async with asked_meanwhile(gateways[0], answers_until, listen.http_port) as (stack, told):
        for former, later in pairwise(gateways):
            await stack.enter_async_context(opened(later))
            await asyncio.gather(former.app.answers(20), later.app.answers(20))
            await former.listeners.close(LIMIT_S)
            await later.app.answers(20)
    assert told == {gateway.app.name: gateway.app.count for gateway in gateways}


class HeldUpstream(FakeUpstream):
    def __init__(self, text: str) -> None:
        super().__init__(says(text))
        self.is_asked, self.goes_on = asyncio.Event(), asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.is_asked.set()
        await self.goes_on.wait()
        async for event in super().generate(request):
            yield event


@in_loop
async def test_a_call_under_way_is_finished_while_new_ones_go_elsewhere() -> None:
    listen, upstream = own_ports(), HeldUpstream(" one")
    first, second = Gateway(listen, upstream=upstream), Gateway(listen, "two")
    async with opened(first):
        call = asyncio.create_task(generated(listen.grpc_port))
        await upstream.is_asked.wait()
        async with opened(second):
            assert connections_on(listen.grpc_port, psutil.CONN_LISTEN) == 2
            closing = asyncio.create_task(first.listeners.close(LIMIT_S))
            await until(lambda: connections_on(listen.grpc_port, psutil.CONN_LISTEN) == 1)
            assert [await generated(listen.grpc_port) for _ in range(3)] == [" two"] * 3
            assert not closing.done()
            upstream.goes_on.set()
            assert await call == " one"
            await closing


def calls_until(port: int, is_over: threading.Event, keeps: bool) -> Counter[str]:
    """Call until the end; returns how calls ended. Nothing is sent again on new channels."""
    # A kept channel may send a call that has never left it, as it does by default.
    options = [("grpc.enable_retries", keeps), ("grpc.use_local_subchannel_pool", 1)]
    ends, channel = Counter[str](), None
    while not is_over.is_set():
        if channel is None:
            channel = grpc.insecure_channel(f"{HOST}:{port}", options=options)
        ask = channel.unary_unary("/expertmesh.v1.Inference/GetModelInfo")
        ends[ask.future(b"", timeout=LIMIT_S).code().name] += 1
        if not keeps:
            channel.close()
            channel = None
    return ends


@in_loop
async def test_no_call_fails_while_gateways_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of clients that never pause end by their age."""
    monkeypatch.setattr("router.gateway.listen.grpc.AGE_S", 1.0)
    listen = own_ports()
    gateways = [Gateway(listen, str(number)) for number in range(4)]
    async with asked_meanwhile(gateways[0], calls_until, listen.grpc_port) as (stack, ends):
        for former, later in pairwise(gateways):
            await stack.enter_async_context(opened(later))
            await former.listeners.close(LIMIT_S, hands_over=True)
            assert connections_on(listen.grpc_port, psutil.CONN_LISTEN) == 1
    assert set(ends) == {"OK"}


def asked_at_once(port: int, goes: threading.Event, is_ready: threading.Event) -> Counter[str]:
    """Make a connection, and a hundred calls on it once ``goes`` is set; returns their ends."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{HOST}:{port}", options=options) as channel:
        grpc.channel_ready_future(channel).result(LIMIT_S)
        is_ready.set()
        goes.wait(LIMIT_S)
        ask = channel.unary_unary("/expertmesh.v1.Inference/GetModelInfo")
        calls = [ask.future(b"", timeout=LIMIT_S) for _ in range(100)]
        return Counter(call.code().name for call in calls)


@in_loop
async def test_calls_that_nobody_has_taken_yet_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grpcio's own stop cancels them, and some of more than a thousand without a stop."""
    monkeypatch.setattr("router.gateway.listen.grpc.QUIET_S", 1.0)  # the clients' threads are here
    monkeypatch.setattr("router.gateway.listen.grpc.TAKE_S", LIMIT_S)
    listen, goes = own_ports(), threading.Event()
    gateway, loop = Gateway(listen), asyncio.get_running_loop()
    async with opened(gateway):
        ready = [threading.Event() for _ in range(16)]
        loop.set_default_executor(ThreadPoolExecutor(len(ready)))
        calls = [
            asyncio.create_task(asyncio.to_thread(asked_at_once, listen.grpc_port, goes, one))
            for one in ready
        ]
        await until(lambda: all(one.is_set() for one in ready))
        goes.set()
        time.sleep(1.0)  # the event loop takes no call
        await gateway.listeners.close(LIMIT_S)
        assert sum(await asyncio.gather(*calls), Counter[str]()) == {"OK": 1600}


@pytest.mark.parametrize("key", PORTS)
@in_loop
async def test_another_application_is_refused_by_name_and_keeps_no_port(key: str) -> None:
    listen = own_ports()
    other = own_ports()
    while {*other.ports().values()} & {*listen.ports().values()}:
        other = own_ports()
    other = other.model_copy(update={key: listen.ports()[key]})
    first, second = Gateway(listen), Gateway(other, "two")
    async with opened(first, application="app one"):
        with pytest.raises(ConfigError) as refused:
            await second.listeners.open("app two")
        assert refused.value.field == f"gateway.listen.{key}"
        words = f"port {listen.ports()[key]} of {HOST} is used by application app one;"
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
        check_free(other, apart_from=key)
        assert await fetched(listen.http_port) == "one"
        assert await generated(listen.grpc_port) == " one"
    async with opened(Gateway(other, "two"), application="app two"):
        assert await generated(other.grpc_port) == " two"


OTHER_PROGRAM = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2])), reuse_port=sys.argv[3] == "True"):
    print("listens", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_program(port: int, shares: bool) -> Iterator[str]:
    """Run a program that listens on a port; gives its name and number as errors have them."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROGRAM, HOST, str(port), str(shares)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        yield f"{name} (pid {process.pid})"
        process.communicate()


@pytest.mark.parametrize(
    ("key", "shares"), [*((key, False) for key in PORTS), ("grpc_port", True), ("http_port", True)]
)
@in_loop
async def test_another_programs_port_is_refused_and_none_stays_open(key: str, shares: bool) -> None:
    """Whether or not the program lets others of this user share its port."""
    listen = own_ports()
    with other_program(listen.ports()[key], shares) as named:
        with pytest.raises(ConfigError) as refused:
            await Gateway(listen).listeners.open("app")
        check_free(listen, apart_from=key)
    port = listen.ports()[key]
    told = f"gateway.listen.{key}: cannot use {port}: it is taken by {named}"
    assert str(refused.value) == told
    async with opened(Gateway(listen)):
        assert await generated(listen.grpc_port) == " one"


@pytest.mark.parametrize(
    ("others", "field", "words"),
    [
        ({"host": "192.0.2.7"}, "http_port", "192.0.2.7 is not an address of this machine"),
        ({"admin_host": "2001:db8::7"}, "admin_port", "2001:db8::7 is not an address of this"),
        ({"host": "no-such-name.invalid"}, "host", "no-such-name.invalid has no address"),
        ({"admin_host": "no-such-name.invalid"}, "admin_host", "no-such-name.invalid has no"),
    ],
)
@in_loop
async def test_a_host_that_is_not_ours_is_refused(others: Any, field: str, words: str) -> None:
    listen = own_ports(**others)
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        await Gateway(listen).listeners.open("app")
    assert refused.value.field == f"gateway.listen.{field}"
    assert "\n" not in str(refused.value)
    check_free(listen.model_copy(update={"host": HOST, "admin_host": HOST}))


@pytest.fixture
def key(tmp_path: Path) -> str:
    return add_key(tmp_path / "keys.yaml", "operator", list(Role))


@pytest.fixture
def access(tmp_path: Path, key: str) -> Access:
    """The access of those who have the key; others are refused at once."""
    return Access(Keyring(tmp_path / "keys.yaml"), Metrics().refused_caller, slow_s=0.0)


REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def services_told(port: int) -> set[str]:
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        # One message: grpcio's stream of them may be written to after its end.
        ask = channel.unary_unary(
            REFLECTION,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        reply: Any = await ask(reflection_pb2.ServerReflectionRequest(list_services=""))
        return {service.name for service in reply.list_services_response.service}


async def code_of(port: int, path: str, *keys: str) -> grpc.StatusCode:
    """Return the status of a call with an empty message, and with these keys."""
    metadata = [(FIELD, f"Bearer {key}") for key in keys]
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        call = channel.unary_unary(path)(b"", metadata=metadata)
        return await call.code()


@in_loop
async def test_services_are_described_only_where_access_is_open(access: Access, key: str) -> None:
    listen = own_ports()
    async with opened(Gateway(listen)):
        by_itself = {"grpc.reflection.v1alpha.ServerReflection"}
        assert await services_told(listen.grpc_port) == {*SERVICES} | by_itself
        admin = {"expertmesh.v1.Admin"}
        assert await services_told(listen.admin_port) == admin | by_itself
    async with opened(Gateway(listen, access=access)):
        for port in (listen.grpc_port, listen.admin_port):
            for given in ((), (key,)):
                assert await code_of(port, REFLECTION, *given) is grpc.StatusCode.UNIMPLEMENTED


@in_loop
async def test_methods_that_a_port_lacks_are_unimplemented(access: Access, key: str) -> None:
    for judge in (access, everybody()):
        listen = own_ports()
        async with opened(Gateway(listen, access=judge)):
            codes = {
                await code_of(port, path, *keys)
                for port, path in (
                    (listen.grpc_port, "/expertmesh.v1.Inference/Missing"),
                    (listen.grpc_port, "/expertmesh.v1.Admin/GetStatus"),
                    (listen.admin_port, "/expertmesh.v1.Inference/Generate"),
                    (listen.admin_port, "/none/Missing"),
                )
                for keys in ((), (key,))
            }
            assert codes == {grpc.StatusCode.UNIMPLEMENTED}


@in_loop
async def test_a_call_shows_one_key(access: Access, key: str) -> None:
    listen = own_ports()
    async with opened(Gateway(listen, access=access)):
        path = "/expertmesh.v1.Inference/GetModelInfo"
        codes = [await code_of(listen.grpc_port, path, *keys) for keys in ((), (key,), (key, key))]
        refused = grpc.StatusCode.UNAUTHENTICATED
        assert codes == [refused, grpc.StatusCode.OK, refused]


@in_loop
async def test_with_a_certificate_it_answers_by_tls_alone_but_for_its_probe(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "tls", asks_clients=True)

    listen = ListenConfig.model_validate(own_ports().model_dump() | {"tls": pair.listen()})
    async with opened(Gateway(listen)):
        async with httpx.AsyncClient(verify=pair.context(), timeout=LIMIT_S) as client:
            assert (await client.get(f"https://{HOST}:{listen.http_port}/")).text == "one"
        with pytest.raises(httpx.TransportError):
            await fetched(listen.http_port)
        assert await generated(listen.grpc_port, tls=pair.tls()) == " one"
        with pytest.raises(UnreachableError):
            await generated(listen.grpc_port)
        async with httpx.AsyncClient(timeout=LIMIT_S) as client:
            url = f"http://{HOST}:{listen.health_port}"
            answer = await client.get(f"{url}/-/healthz")
            assert (answer.status_code, answer.text) == (200, "success")
            for path in ("/", "/health", "/v1/models", "/-/healthz/more"):
                assert (await client.get(f"{url}{path}")).status_code == 404


@in_loop
async def test_a_message_is_refused_by_name_and_a_far_longer_one_by_grpc() -> None:
    listen = own_ports()
    async with (
        opened(Gateway(listen)),
        AsyncClient(f"{HOST}:{listen.grpc_port}", retry=None) as client,
    ):
        with pytest.raises(ExpertMeshError, match="over the limit of 4194304 bytes"):
            await client.generate("x" * 5_000_000, SAMPLING, model="tiny")
        with pytest.raises(ExpertMeshError, match="larger than max"):
            await client.generate("x" * 17_000_000, SAMPLING, model="tiny")


@pytest.mark.parametrize(
    ("num_open", "times"),
    [([10, 509, 10], 0), ([10, 510, 10, 10], 1), ([10, 400, 600, 90, 595], 1)],
)
@in_loop
async def test_the_memory_of_a_crowd_is_given_back_once_it_has_left(
    monkeypatch: pytest.MonkeyPatch, num_open: list[int], times: int
) -> None:
    """By the numbers of descriptors, as they are looked at."""
    given_back, looked = [], threading.Event()

    def look() -> int:
        if len(num_open) == 1:
            looked.set()
            return num_open[0]
        return num_open.pop(0)

    monkeypatch.setattr(
        listeners, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(num_fds=look))
    )
    monkeypatch.setattr(listeners, "give_back_freed", lambda: given_back.append(None))
    monkeypatch.setattr(listeners, "FREED_PERIOD_S", 0.0)
    async with opened(Gateway(own_ports())):
        await until(looked.is_set)
    assert len(given_back) == times


async def greeted(port: int) -> tuple[asyncio.StreamWriter, bytes]:
    """Return a new HTTP/2 connection, and the first bytes of the server."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        return writer, await reader.read(9)
    except ConnectionError:
        return writer, b""


@in_loop
async def test_a_grpc_connection_beyond_the_limit_is_refused_until_another_one_ends() -> None:
    listen = own_ports(max_connections=2)
    async with opened(Gateway(listen)):
        writers = []
        for is_answered in (True, True, False, False):
            writer, told = await greeted(listen.grpc_port)
            writers.append(writer)
            assert bool(told) == is_answered
        writers[0].close()
        told = b""
        while not told:
            writer, told = await greeted(listen.grpc_port)
            writers.append(writer)
        for writer in writers:
            writer.close()


@in_loop
async def test_a_message_that_stays_away_ends_its_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call whose message stays away (HTTP/2 by hand), and then one that has a message."""
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(limits, "BODY_BYTES_PER_S", 1 << 40)
    head = b"\x83\x86" + b"".join(  # POST, http
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in (
            (b":path", b"/grpc.health.v1.Health/Check"),
            (b":authority", b"here"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )

    def call(stream: int, data: bytes) -> bytes:
        length = len(head).to_bytes(3, "big")
        frames = length + b"\1\4" + stream.to_bytes(4, "big") + head
        if data:
            frames += len(data).to_bytes(3, "big") + b"\0\1" + stream.to_bytes(4, "big") + data
        return frames

    listen = own_ports()
    async with opened(Gateway(listen)):
        reader, writer = await asyncio.open_connection(HOST, listen.grpc_port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        writer.write(call(1, b""))
        await reader.readuntil(b"the message did not arrive within")
        writer.write(call(3, b"\0\0\0\0\0"))
        await reader.readuntil(b"\0\0\0\0\2\x08\1")  # SERVING
        writer.close()


LARGE, PIECE = b"large", BytesValue(value=bytes(64 << 10))


@in_loop
async def test_a_stream_that_nobody_reads_holds_up_none_of_its_connection() -> None:
    num_begun, all_begun, is_written = 0, asyncio.Event(), asyncio.Event()

    async def write(
        request: bytes, caller: Caller | None, context: Any
    ) -> AsyncGenerator[BytesValue, None]:
        nonlocal num_begun
        num_begun += 1
        if num_begun == MAX_STREAMS:
            all_begun.set()
        await all_begun.wait()
        for _ in range(128 if request == LARGE else 2):
            yield PIECE
        if request == LARGE:
            is_written.set()

    [port] = free_ports(1)
    methods = {"/s/Stream": Method(None, write, is_stream=True)}
    door = Door(everybody(), methods, MAX_BODY_BYTES)
    listener = GrpcListener(door, (), ListenConfig(), MAX_BODY_BYTES, None)
    await listener.start(HOST, port, "")
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        stream = channel.unary_stream("/s/Stream")
        unread = stream(LARGE)

        async def num_pieces(call: Any) -> int:
            return sum([1 async for _ in call])

        others = [asyncio.create_task(num_pieces(stream(b""))) for _ in range(MAX_STREAMS - 1)]
        assert await asyncio.gather(*others) == [2] * len(others)
        assert not is_written.is_set()
        assert connections_on(port, psutil.CONN_ESTABLISHED) == 1
        assert await num_pieces(unread) == 128
    await listener.stop(0.0)


class Crowd(Access):
    """Judges no call before all of them have come."""

    def __init__(self, access: Access, size: int) -> None:
        self._judge, self._size, self._num_come = access, size, 0
        self._all_come = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return False

    async def admit(self, *call: Any) -> Caller:
        self._num_come += 1
        if self._num_come == self._size:
            self._all_come.set()
        await self._all_come.wait()
        return await self._judge.admit(*call)


STRANGER = f"""
import sys, grpc
message = bytes({15 * MIB})
with grpc.insecure_channel(sys.argv[1]) as channel:
    method = channel.unary_unary("/expertmesh.v1.Inference/Generate")
    print(*[call.code().name for call in [method.future(message) for _ in range(24)]])
"""


def memory_bytes(name: str) -> int:
    """Return what the system tells of this process's memory: ``VmRSS``, or its peak ``VmHWM``."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@in_loop
async def test_what_strangers_send_takes_no_memory(access: Access) -> None:
    listen = own_ports()
    crowd = Crowd(access, 24)
    async with opened(Gateway(listen, access=crowd, max_body_bytes=4 * MIB)):
        before = memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        stranger = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            STRANGER,
            f"{HOST}:{listen.grpc_port}",
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await stranger.communicate()
        assert told.split() == [b"UNAUTHENTICATED"] * 24
        assert memory_bytes("VmHWM") - before < 64 * MIB
