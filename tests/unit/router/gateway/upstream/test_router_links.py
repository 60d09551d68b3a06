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
from router.gateway.upstream.router_links import KeysOf, RouterCalls
from router.messages import call_link
from router.messages.call_link import SILENT_S, CallServer, LinkBrokenError, LinkCall, Wire
from router.messages.link import LinkAddress
from router.mixture.replica import MixtureReplica
from tests.span_keeper import SpanKeeper
from tests.unit.router.messages.handshakes import by_tcp
from tests.unit.router.messages.test_token_link import happens

MODEL = "m@1"
NODE, OTHER = "node", "other node"
BY_SERVE = "by Serve"


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
        self.generate = self
        self.spans: list[Span] = []

    def remote(self, wire: Wire) -> str:
        """Keep the span that Serve would send with a call of ``generate``."""
        self.spans.append(trace.get_current_span())
        return BY_SERVE

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
) -> AsyncIterator[RouterCalls]:
    """Links that have found their routers."""
    links = RouterCalls(serve, MODEL, NODE, "generate", None, lambda kind: None, keys_of)  # type: ignore[arg-type]
    assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
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


def begun(links: RouterCalls, wire: Wire | None = None) -> LinkCall:
    """Call a router over a link."""
    call = links.call(wire or {}, trace.INVALID_SPAN)
    assert call != BY_SERVE
    return call  # type: ignore[no-any-return]


async def called(links: RouterCalls, wire: Wire | None = None) -> Any:
    return (await begun(links, wire))["reply"]


@pytest.fixture(autouse=True)
def asks_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "REFRESH_S", 0.0)
    monkeypatch.setattr(links_module, "KEPT_S", 0.0)


async def refreshed(links: RouterCalls) -> None:
    links.call({}, trace.INVALID_SPAN, by_serve=True)
    await happens(lambda: links._asking is None)


async def test_the_first_call_is_serves_and_later_ones_take_turns_among_the_routers() -> None:
    async with linked(Serve(*map(Router, "abc"))) as links:
        assert [await called(links) for _ in range(6)] == list("abcabc")


async def test_the_router_that_owes_the_fewest_answers_is_called() -> None:
    serve = Serve(*map(Router, "ab"))
    async with linked(serve) as links:
        busy = serve.routers[0]
        busy.may_answer.clear()
        waiting = begun(links)
        assert [await called(links) for _ in range(4)] == list("bbbb")
        busy.may_answer.set()
        assert await waiting == {"reply": "a"}
        assert await called(links) == "a"


async def test_a_request_is_sent_over_no_link_to_a_router_that_was_asked() -> None:
    async with linked(Serve(*map(Router, "ab"))) as links:
        asked: set[LinkAddress] = set()
        replies = []
        while links.has_other(asked):
            replies.append(await links.call({}, trace.INVALID_SPAN, asked=asked))
        assert replies == [{"reply": "a"}, {"reply": "b"}]
        assert asked == set(links._links)
        assert links.call({}, trace.INVALID_SPAN, asked=asked) == BY_SERVE


async def test_a_silent_router_is_called_last() -> None:
    serve = Serve(*map(Router, "ab"))
    async with linked(serve) as links:
        hung, busy = serve.routers
        hung.may_answer.clear()
        busy.may_answer.clear()
        calls = [begun(links) for _ in range(3)]
        await happens(lambda: (hung.asked, busy.asked) == (2, 1))
        owing = max(links._links.values(), key=lambda link: link.num_unanswered)
        owing._waits_since_s -= 2 * SILENT_S
        calls += [begun(links) for _ in range(4)]
        await happens(lambda: (hung.asked, busy.asked) == (2, 5))
        busy.may_answer.set()
        hung.may_answer.set()
        await asyncio.gather(*calls)


async def test_a_prompt_goes_to_the_router_that_had_its_beginning_unless_that_is_busy() -> None:
    serve = Serve(*map(Router, "ab"))
    async with linked(serve, keys_of=lambda wire: wire["keys"] if wire else []) as links:
        first, second = {"keys": [b"1", b"11"]}, {"keys": [b"2", b"21"]}
        assert [await called(links, wire) for wire in (first, second)] == ["a", "b"]
        again = [first, first, second, {"keys": [b"1", b"12"]}, {"keys": [b"2"]}, first]
        assert [await called(links, wire) for wire in again] == list("aababa")
        busy = serve.routers[0]
        busy.may_answer.clear()
        waiting = [begun(links, first) for _ in range(3)]
        await happens(lambda: busy.asked == 8)
        assert await called(links, first) == "b"
        busy.may_answer.set()
        await asyncio.gather(*waiting)
        assert set(links._sent) == set(links._links)
        serve.routers = serve.routers[1:]
        await refreshed(links)
        await refreshed(links)
        assert set(links._sent) == set(links._links)
        busy.server.close()


async def test_the_routers_are_asked_for_a_while_after_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


async def test_the_routers_are_asked_once_a_while_and_only_for_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Serve(Router("a"))
    async with linked(serve) as links:
        monkeypatch.setattr(links_module, "REFRESH_S", 3600.0)
        for _ in range(10):
            assert await called(links) == "a"
        assert serve.num_asked == 1
        monkeypatch.setattr(links_module, "REFRESH_S", 0.0)
        await called(links)
        await happens(lambda: serve.num_asked == 2)


async def test_a_new_router_is_found_and_one_that_serve_ends_is_left() -> None:
    first, second = map(Router, "ab")
    serve = Serve(first)
    async with linked(serve) as links:
        first.may_answer.clear()
        owed = begun(links)
        await happens(lambda: first.asked == 1)
        serve.routers, serve.answers = [], [TimeoutError()]
        await refreshed(links)
        assert len(links._links) == 1  # where a router does not tell, no link is left
        serve.routers, serve.answers = [second], []
        await refreshed(links)
        assert [await called(links) for _ in range(3)] == ["b"] * 3
        first.may_answer.set()
        assert await owed == {"reply": "a"}  # what it owed has come
        await happens(lambda: not first.server._writers)
        first.server.close()


async def test_after_a_pause_serve_carries_requests_until_the_routers_are_known_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, new = map(Router, "ab")
    serve = Serve(ended)
    async with linked(serve) as links:
        serve.routers = [new]  # a redeploy while nobody asks
        links._known_at_s -= 2 * links_module.STALE_S
        assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
        await happens(lambda: links._asking is None)
        assert await called(links) == "b"
        serve.answers = [TimeoutError()]
        await refreshed(links)
        assert await called(links) == "b"
        monkeypatch.setattr(links_module, "STALE_S", 0.0)  # it has not told for so long
        assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
        await happens(lambda: not ended.server._writers)
        ended.server.close()


async def test_a_broken_link_is_made_again() -> None:
    serve = Serve(Router("a"))
    async with linked(serve) as links:
        serve.routers[0].may_answer.clear()
        lost = begun(links)
        await happens(lambda: serve.routers[0].asked == 1)
        for writer in serve.routers[0].server._writers:
            writer.transport.abort()
        with pytest.raises(LinkBrokenError):
            await lost
        assert links.call({}, trace.INVALID_SPAN) == BY_SERVE  # Serve's call carries it
        serve.routers[0].may_answer.set()
        await happens(lambda: links._asking is None)
        assert await called(links) == "a"


async def test_calls_go_over_links_but_for_sampled_requests_and_those_whose_link_broke() -> None:
    counted, told, linked_then = list[str](), list[str](), list[int]()
    handle = Serve(Router("a"), Router("b", OTHER))
    calls = RouterCalls(handle, MODEL, NODE, "generate", None, counted.append)  # type: ignore[arg-type]

    def hear(node: str) -> None:
        told.append(node)
        linked_then.append(len(calls._links))

    calls.on_node = hear
    sampled = SpanKeeper().tracer.start_span("sampled")
    assert calls.call({}, sampled) == BY_SERVE
    assert handle.spans[0] is sampled  # Serve takes it along
    await happens(lambda: calls._asking is None)
    # The nodes are told for a sampled request, too, and before there is a link.
    assert (told[:2], linked_then[:2]) == ([NODE, OTHER], [0, 0])
    links = calls._links.values()
    kinds = [link._writer.get_extra_info("socket").family for link in links]
    assert sorted(kinds) == sorted([socket.AF_UNIX, socket.AF_INET])
    assert await calls.call({}, trace.INVALID_SPAN) == {"reply": "a"}
    assert calls.call({}, trace.INVALID_SPAN, by_serve=True) == BY_SERVE
    assert counted == ["serve", "link", "serve"]
    for link in links:
        link.close()
    for router in handle.routers:
        router.server.close()


async def test_a_router_that_is_not_found_is_logged_once_and_serve_carries_its_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "expertmesh.link")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # Ray's node is the same, and the network namespace is not.
    nowhere = LinkAddress(NODE, "secret", b"\0expertmesh-nowhere")
    serve = Serve()
    serve.answers = [None, by_tcp(port), nowhere]
    async with linked(serve, 0) as links:
        for _ in range(3):
            await refreshed(links)
            assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
    _, line = sorted(record.getMessage() for record in caplog.records)
    assert line.startswith("no link to a router (unix, ")


async def test_routers_that_cannot_be_asked_for_long_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "expertmesh.link")
    serve = Serve()
    async with linked(serve, 0) as links:
        for _ in range(2):
            serve.error = TimeoutError()
            for _ in range(links_module.PATIENCE - 1):
                await refreshed(links)
            assert not caplog.records
            for _ in range(links_module.PATIENCE):
                await refreshed(links)
            assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
            [record] = caplog.records
            assert record.getMessage().startswith("could not ask the routers")
            caplog.clear()
            serve.error = None
            await refreshed(links)


async def test_a_router_without_a_way_for_this_node_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve, told = Serve(), list[str]()
    serve.answers = [LinkAddress(OTHER, "secret")]  # where Ray's calls alone are encrypted
    async with linked(serve, 0) as links:
        links.on_node = told.append
        await refreshed(links)
        assert links.call({}, trace.INVALID_SPAN) == BY_SERVE
        assert told == [OTHER]
    assert not caplog.records


@pytest.mark.parametrize(("is_encrypted", "has_port"), [("0", True), ("1", False)])
async def test_only_within_a_node_links_are_offered_beside_rays_encrypted_calls(
    monkeypatch: pytest.MonkeyPatch, is_encrypted: str, has_port: bool
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", is_encrypted)
    monkeypatch.setattr(call_link.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    context = SimpleNamespace(get_node_id=lambda: NODE)
    monkeypatch.setattr(call_link.ray, "get_runtime_context", lambda: context)
    server = call_link.call_server(Router("a")._predict, None)
    assert (await server.start(NODE)).is_reachable
    assert (await server.start(OTHER)).is_reachable == has_port
    server.close()


@pytest.mark.parametrize("kind", [RouterReplica, MixtureReplica])
async def test_a_router_has_links_for_gateways_of_its_own_model_alone(kind: Any) -> None:
    server = Router("a").server
    router = SimpleNamespace(_server=server, _model=SimpleNamespace(key=MODEL))
    assert await kind.link(router, "m@2", NODE) is None
    here = await kind.link(router, MODEL, NODE)
    assert (here.node, bool(here.name), here.port) == (NODE, True, 0)
    there = await kind.link(router, MODEL, OTHER)
    assert (there.node, there.name, bool(there.port)) == (NODE, b"", True)
    assert await kind.link(router, MODEL, NODE) == here
    server.close()
