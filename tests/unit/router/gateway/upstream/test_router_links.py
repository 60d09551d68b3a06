"""How a gateway finds the routers of a model, and which of them it calls over a link."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import Span

from router.engine.replica import RouterReplica
from router.gateway.upstream import router_links as links_module
from router.gateway.upstream.affinity import no_keys
from router.gateway.upstream.router_links import KeysOf, RouterCalls, RouterLinks
from router.messages import call_link
from router.messages.call_link import SILENT_S, CallServer, LinkBrokenError, Wire
from router.messages.link import LinkAddress
from router.mixture.replica import MixtureReplica
from tests.span_keeper import SpanKeeper
from tests.unit.router.messages.handshakes import by_tcp
from tests.unit.router.messages.test_token_link import happens, run

MODEL = "m@1"
NODE, OTHER = "node", "other node"


class Router:
    """A router behind a link: keeps what it is asked, and answers once it may."""

    def __init__(self, name: str, node: str = NODE) -> None:
        self.name = name
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.server = CallServer(node, "127.0.0.1", self._predict, None)

    async def _predict(self, wire: Wire) -> Wire:
        self.asked += 1
        await self.may_answer.wait()
        return {"reply": self.name}


class Serve:
    """A deployment's handle: which routers run, as Serve tells it."""

    def __init__(self, *routers: Router) -> None:
        self.routers: list[Router] = list(routers)
        self.answers: list[Any] = []
        """What else is answered: an error, or a router without links."""
        self.error: Exception | None = None
        self.num_asked = 0

    def broadcast(self, method: str, model: str, node: str) -> Serve:
        assert (method, model, node) == ("link", MODEL, NODE)
        self.num_asked += 1
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        if self.error is not None:
            raise self.error
        return [await router.server.start(NODE) for router in self.routers] + self.answers


@asynccontextmanager
async def linked(
    serve: Serve, count: int | None = None, keys_of: KeysOf = no_keys
) -> AsyncIterator[RouterLinks]:
    """Links that have found their routers."""
    links = RouterLinks(serve, MODEL, NODE, None, keys_of)  # type: ignore[arg-type]
    assert links.call({}) is None
    await happens(lambda: links._asking is None)
    assert len(links._links) == (len(serve.routers) if count is None else count)
    try:
        yield links
    finally:
        if links._asking is not None:
            links._asking.cancel()
        for link in links._links.values():
            link.close()
        for router in serve.routers:
            router.server.close()


async def called(links: RouterLinks, wire: Wire | None = None) -> Any:
    call = links.call(wire or {})
    assert call is not None
    return (await call)["reply"]


@pytest.fixture(autouse=True)
def asks_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "REFRESH_S", 0.0)
    monkeypatch.setattr(links_module, "KEPT_S", 0.0)


async def refreshed(links: RouterLinks) -> None:
    links.keep_fresh()
    await happens(lambda: links._asking is None)


def test_the_first_call_is_serves_and_later_ones_take_turns_among_the_routers() -> None:
    async def test() -> None:
        async with linked(Serve(*map(Router, "abc"))) as links:
            assert [await called(links) for _ in range(6)] == list("abcabc")

    run(test)


def test_the_router_that_owes_the_fewest_answers_is_called() -> None:
    async def test() -> None:
        serve = Serve(*map(Router, "ab"))
        async with linked(serve) as links:
            busy = serve.routers[0]
            busy.may_answer.clear()
            waiting = links.call({})
            assert waiting is not None
            assert [await called(links) for _ in range(4)] == list("bbbb")
            busy.may_answer.set()
            assert await waiting == {"reply": "a"}
            assert await called(links) == "a"

    run(test)


def test_a_silent_router_is_called_last() -> None:
    async def test() -> None:
        serve = Serve(*map(Router, "ab"))
        async with linked(serve) as links:
            hung, busy = serve.routers
            hung.may_answer.clear()
            busy.may_answer.clear()
            calls = [links.call({}) for _ in range(3)]
            await happens(lambda: (hung.asked, busy.asked) == (2, 1))
            owing = max(links._links.values(), key=lambda link: link.num_unanswered)
            owing._waits_since_s -= 2 * SILENT_S
            calls += [links.call({}) for _ in range(4)]
            await happens(lambda: (hung.asked, busy.asked) == (2, 5))
            busy.may_answer.set()
            hung.may_answer.set()
            await asyncio.gather(*(call for call in calls if call is not None))

    run(test)


def test_a_prompt_goes_to_the_router_that_had_its_beginning_unless_that_is_busy() -> None:
    async def test() -> None:
        serve = Serve(*map(Router, "ab"))
        async with linked(serve, keys_of=lambda wire: wire["keys"] if wire else []) as links:
            first, second = {"keys": [b"1", b"11"]}, {"keys": [b"2", b"21"]}
            assert [await called(links, wire) for wire in (first, second)] == ["a", "b"]
            again = [first, first, second, {"keys": [b"1", b"12"]}, {"keys": [b"2"]}, first]
            assert [await called(links, wire) for wire in again] == list("aababa")
            busy = serve.routers[0]
            busy.may_answer.clear()
            waiting = [links.call(first) for _ in range(3)]
            await happens(lambda: busy.asked == 8)
            assert await called(links, first) == "b"
            busy.may_answer.set()
            await asyncio.gather(*(call for call in waiting if call is not None))
            assert set(links._sent) == set(links._links)
            serve.routers = serve.routers[1:]
            await refreshed(links)
            await refreshed(links)
            assert set(links._sent) == set(links._links)
            busy.server.close()

    run(test)


def test_the_routers_are_asked_for_a_while_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        serve = Serve(Router("a"))
        monkeypatch.setattr(links_module, "KEPT_S", 60.0)
        async with linked(serve) as links:
            await happens(lambda: serve.num_asked >= 5)
            known_at_s = links._known_at_s
            await happens(lambda: links._known_at_s > known_at_s)
            assert await called(links) == "a"  # as if the call before had just been
            links._wanted_at_s -= 61.0
            await happens(lambda: links._asking is None)
            num_asked = serve.num_asked
            await asyncio.sleep(0.05)
            assert serve.num_asked == num_asked
            assert await called(links) == "a"
            await happens(lambda: serve.num_asked > num_asked)

    run(test)


def test_the_routers_are_asked_once_a_while_and_only_for_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        serve = Serve(Router("a"))
        async with linked(serve) as links:
            monkeypatch.setattr(links_module, "REFRESH_S", 3600.0)
            for _ in range(10):
                assert await called(links) == "a"
            assert serve.num_asked == 1
            monkeypatch.setattr(links_module, "REFRESH_S", 0.0)
            await called(links)
            await happens(lambda: serve.num_asked == 2)

    run(test)


def test_a_new_router_is_found_and_one_that_serve_ends_is_left() -> None:
    async def test() -> None:
        first, second = map(Router, "ab")
        serve = Serve(first)
        async with linked(serve) as links:
            first.may_answer.clear()
            owed = links.call({})
            await happens(lambda: first.asked == 1)
            serve.routers = [second]
            await refreshed(links)
            assert [await called(links) for _ in range(3)] == ["b"] * 3
            first.may_answer.set()
            assert owed is not None
            assert await owed == {"reply": "a"}  # what it owed has come
            await happens(lambda: not first.server._writers)
            first.server.close()

    run(test)


def test_where_a_router_does_not_tell_no_link_is_left() -> None:
    async def test() -> None:
        serve = Serve(Router("a"))
        async with linked(serve) as links:
            [router] = serve.routers
            serve.routers, serve.answers = [], [TimeoutError()]
            await refreshed(links)
            assert await called(links) == "a"
            serve.routers = [router]

    run(test)


def test_after_a_pause_serve_carries_requests_until_the_routers_are_known_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        ended, new = map(Router, "ab")
        serve = Serve(ended)
        async with linked(serve) as links:
            serve.routers = [new]  # a redeploy while nobody asks
            links._known_at_s -= 2 * links_module.STALE_S
            assert links.call({}) is None
            await happens(lambda: links._asking is None)
            assert await called(links) == "b"
            serve.answers = [TimeoutError()]
            await refreshed(links)
            assert await called(links) == "b"
            monkeypatch.setattr(links_module, "STALE_S", 0.0)  # it has not told for so long
            assert links.call({}) is None
            await happens(lambda: not ended.server._writers)
            ended.server.close()

    run(test)


def test_a_broken_link_is_made_again() -> None:
    async def test() -> None:
        serve = Serve(Router("a"))
        async with linked(serve) as links:
            serve.routers[0].may_answer.clear()
            lost = links.call({})
            await happens(lambda: serve.routers[0].asked == 1)
            for writer in serve.routers[0].server._writers:
                writer.transport.abort()
            assert lost is not None
            with pytest.raises(LinkBrokenError):
                await lost
            assert links.call({}) is None  # Serve's call carries it
            serve.routers[0].may_answer.set()
            await happens(lambda: links._asking is None)
            assert await called(links) == "a"

    run(test)


def test_without_links_every_call_is_serves() -> None:
    async def test() -> None:
        serve = Serve()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        serve.answers = [None, by_tcp(port)]
        async with linked(serve, 0) as links:
            serve.error = RuntimeError("no replica runs")
            await refreshed(links)
            assert links.call({}) is None

    run(test)


class Handle(Serve):
    """A deployment's handle whose ``generate.remote`` keeps the span that Serve would send."""

    def __init__(self, *routers: Router) -> None:
        super().__init__(*routers)
        self.generate = self
        self.spans: list[Span] = []

    def remote(self, wire: Wire) -> str:
        self.spans.append(trace.get_current_span())
        return "by Serve"


def test_calls_go_over_links_but_for_sampled_requests_and_those_whose_link_broke() -> None:
    async def test() -> None:
        counted: list[str] = []
        handle = Handle(Router("a"))
        calls = RouterCalls(handle, MODEL, NODE, "generate", None, counted.append)  # type: ignore[arg-type]
        sampled = SpanKeeper().tracer.start_span("sampled")
        assert calls.call({}, trace.INVALID_SPAN) == "by Serve"  # nobody has told of links yet
        await happens(lambda: calls._links._asking is None)
        assert await calls.call({}, trace.INVALID_SPAN) == {"reply": "a"}
        assert calls.call({}, trace.INVALID_SPAN, by_serve=True) == "by Serve"
        assert calls.call({}, sampled) == "by Serve"
        assert counted == ["serve", "link", "serve", "serve"]
        assert handle.spans[2] is sampled  # Serve takes it along
        for link in calls._links._links.values():
            link.close()
        handle.routers[0].server.close()

    run(test)


def test_the_nodes_of_routers_are_told_before_a_request_goes_over_a_link() -> None:
    async def test() -> None:
        handle, told = Handle(Router("a"), Router("b", OTHER)), list[str]()
        calls = RouterCalls(handle, MODEL, NODE, "generate", None, lambda transport: None)  # type: ignore[arg-type]
        linked_then: list[int] = []

        def hear(node: str) -> None:
            told.append(node)
            linked_then.append(len(calls._links._links))

        calls.on_node(hear)
        sampled = SpanKeeper().tracer.start_span("sampled")
        assert calls.call({}, sampled) == "by Serve"  # of traced requests they are told, too
        await happens(lambda: calls._links._asking is None)
        assert (told, linked_then) == ([NODE, OTHER], [0, 0])
        kinds = [
            link._writer.get_extra_info("socket").family for link in calls._links._links.values()
        ]
        assert sorted(kinds) == sorted([socket.AF_UNIX, socket.AF_INET])
        for link in calls._links._links.values():
            link.close()
        for router in handle.routers:
            router.server.close()

    run(test)


def test_a_router_that_is_not_found_is_logged_once_and_serve_carries_its_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "expertmesh.link")

    async def test() -> None:
        serve = Serve()
        # Ray's node is the same, and the network namespace is not.
        serve.answers = [LinkAddress(NODE, "secret", b"\0expertmesh-nowhere")]
        async with linked(serve, 0) as links:
            for _ in range(3):
                await refreshed(links)
                assert links.call({}) is None

    run(test)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("no link to a router (unix, ")


def test_routers_that_cannot_be_asked_for_long_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "expertmesh.link")

    async def test() -> None:
        serve = Serve()
        async with linked(serve, 0) as links:
            for _ in range(2):
                serve.error = TimeoutError()
                for _ in range(links_module.PATIENCE - 1):
                    await refreshed(links)
                assert not caplog.records
                for _ in range(links_module.PATIENCE):
                    await refreshed(links)
                [record] = caplog.records
                assert record.getMessage().startswith("could not ask the routers")
                caplog.clear()
                serve.error = None
                await refreshed(links)

    run(test)


def test_a_router_without_a_way_for_this_node_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        serve, told = Serve(), list[str]()
        serve.answers = [LinkAddress(OTHER, "secret")]  # where Ray's calls alone are encrypted
        async with linked(serve, 0) as links:
            links.on_node = told.append
            await refreshed(links)
            assert links.call({}) is None
            assert told == [OTHER]

    run(test)
    assert not caplog.records


@pytest.mark.parametrize(("is_encrypted", "has_port"), [("0", True), ("1", False)])
def test_only_within_a_node_links_are_offered_beside_rays_encrypted_calls(
    monkeypatch: pytest.MonkeyPatch, is_encrypted: str, has_port: bool
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", is_encrypted)
    monkeypatch.setattr(call_link.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    context = SimpleNamespace(get_node_id=lambda: NODE)
    monkeypatch.setattr(call_link.ray, "get_runtime_context", lambda: context)

    async def test() -> None:
        server = call_link.call_server(Router("a")._predict, None)
        assert (await server.start(NODE)).is_reachable
        assert (await server.start(OTHER)).is_reachable == has_port
        server.close()

    run(test)


@pytest.mark.parametrize("kind", [RouterReplica, MixtureReplica])
def test_a_router_has_links_for_gateways_of_its_own_model_alone(kind: Any) -> None:
    async def test() -> None:
        server = Router("a").server
        router = SimpleNamespace(_server=server, _model=SimpleNamespace(key=MODEL))
        assert await kind.link(router, "m@2", NODE) is None
        here = await kind.link(router, MODEL, NODE)
        assert (here.node, bool(here.name), here.port) == (NODE, True, 0)
        there = await kind.link(router, MODEL, OTHER)
        assert (there.node, there.name, bool(there.port)) == (NODE, b"", True)
        assert await kind.link(router, MODEL, NODE) == here
        server.close()

    run(test)
