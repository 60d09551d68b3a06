"""Calls over call links on loopback: replies, cancellations, damage, ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router.messages import call_link
from router.messages import link as link_module
from router.messages.call_link import CallLink, CallServer, LinkBrokenError
from router.messages.link import pack_frame
from router.messages.prediction import PredictionReply, PredictionRequest
from tests.unit.certificates import new_authority
from tests.unit.router.messages.handshakes import by_tcp, listens
from tests.unit.router.messages.test_token_link import LIMIT_S, flipped, happens, run


class Router:
    """A link's server; a test ends each request with its own reply."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.cancelled: list[str] = []
        self.server = CallServer("node", "127.0.0.1", self._predict, tls)

    async def _predict(self, wire: Any) -> dict[str, Any]:
        name = wire["request_id"]
        self.replies[name] = asyncio.get_running_loop().create_future()
        try:
            return await self.replies[name]
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise

    async def asked(self, *names: str) -> None:
        await happens(lambda: set(names) <= self.replies.keys())


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Router, CallLink]]:
    router = Router()
    link = await CallLink.open(await router.server.start("node"), None)
    try:
        yield router, link
    finally:
        link.close()
        router.server.close()


def wire(name: str, num_rows: int = 1) -> dict[str, Any]:
    rows = np.arange(num_rows * 2, dtype="<f8").reshape(num_rows, 2)
    return PredictionRequest(name, "m", {"x": rows}, ("y",), 0.0).to_wire()


@pytest.mark.parametrize("num_rows", [0, 1, 100_000])
def test_a_request_and_its_reply_arrive_whole(num_rows: int) -> None:
    async def test() -> None:
        async def echo(sent: Any) -> dict[str, Any]:
            given = PredictionRequest.from_wire(sent)
            labels = np.array([["ä"], ["longer"]])
            reply = PredictionReply({"y": -given.inputs["x"], "label": labels}, False, "i")
            return {"reply": reply.to_wire()}

        server = CallServer("node", "127.0.0.1", echo, None)
        link = await CallLink.open(await server.start("node"), None)
        told = await link.call(wire("a", num_rows))
        reply = PredictionReply.from_wire(told["reply"])
        expected = -np.arange(num_rows * 2, dtype="<f8").reshape(num_rows, 2)
        np.testing.assert_array_equal(reply.outputs["y"], expected)
        assert reply.outputs["y"].dtype == np.dtype("<f8")
        assert reply.outputs["label"].tolist() == [["ä"], ["longer"]]
        assert (reply.exact, reply.identity) == (False, "i")
        assert link.num_unanswered == 0
        link.close()
        server.close()

    run(test)


def test_calls_are_answered_in_any_order() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            calls = {name: link.call(wire(name)) for name in "abc"}
            await router.asked(*"abc")
            assert link.num_unanswered == 3
            for name in "cab":
                router.replies[name].set_result({"reply": name})
                assert await calls[name] == {"reply": name}
            assert link.num_unanswered == 0

    run(test)


def test_a_cancelled_call_ends_at_the_router_and_its_number_is_free_again() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            kept, left = link.call(wire("kept")), link.call(wire("left"))
            await router.asked("kept", "left")
            left.cancel()
            left.cancel()
            await happens(lambda: router.cancelled == ["left"])
            await happens(lambda: link.num_unanswered == 1)  # the router has acknowledged it
            at_once = link.call(wire("at once"))  # the router reads both frames together
            at_once.cancel()
            await happens(lambda: link.num_unanswered == 1)
            router.replies["kept"].set_result({"reply": 1})
            assert await kept == {"reply": 1}
            kept.cancel()
            for call in (left, at_once):
                with pytest.raises(asyncio.CancelledError):
                    await call

    run(test)


def test_an_error_that_nobody_foresaw_is_internal_and_the_link_lives() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            call = link.call(wire("a"))
            await router.asked("a")
            router.replies["a"].set_exception(RuntimeError("secret"))
            told = await call
            assert told["error"]["message"] == "the router failed"
            unpackable = link.call(wire("b"))
            await router.asked("b")
            router.replies["b"].set_result({"reply": object()})
            assert (await unpackable)["error"]["message"] == "the router failed"
            again = link.call(wire("c"))
            await router.asked("c")
            router.replies["c"].set_result({"reply": 1})
            assert await again == {"reply": 1}

    run(test)


@pytest.mark.parametrize("who", ["router", "gateway"])
def test_when_a_link_ends_its_calls_fail_and_the_requests_end(who: str) -> None:
    async def test() -> None:
        async with linked() as (router, link):
            calls = [link.call(wire(name)) for name in "ab"]
            await router.asked(*"ab")
            calls[1].cancel()
            if who == "router":
                router.server.close()
            else:
                link.close()
            with pytest.raises(LinkBrokenError):
                await calls[0]
            await happens(lambda: sorted(router.cancelled) == ["a", "b"])
            assert not link.is_open
            assert link.num_unanswered == 0

    run(test)


def test_a_link_that_is_left_gives_the_answers_that_are_owed_and_ends() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            call = link.call(wire("a"))
            await router.asked("a")
            link.leave()
            assert not link.is_open
            router.replies["a"].set_result({"reply": 1})
            assert await call == {"reply": 1}
            await happens(lambda: not router.server._writers)
        async with linked() as (router, link):
            link.leave()
            await happens(lambda: not router.server._writers)

    run(test)


def broken_by(sent: bytes, ends: bool) -> None:
    """Check that a router's answer of these bytes ends its link, and is no reply.

    Where the router ``ends`` the connection then, a link that waits for more bytes ends too.
    """

    async def test() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await listens(reader, writer, b"secret")
            await reader.read(1 << 16)
            writer.write(sent)
            if ends:
                writer.write_eof()
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        address = by_tcp(server.sockets[0].getsockname()[1])
        link = await CallLink.open(address, None)
        with pytest.raises(LinkBrokenError):
            await asyncio.wait_for(_answer_of(link), LIMIT_S)
        server.close()

    run(test)


async def _answer_of(link: CallLink) -> Any:
    return await link.call(wire("a"))


@pytest.mark.parametrize("index", [2, 9, 14, 40])
def test_a_damaged_reply_is_no_reply(index: int) -> None:
    broken_by(flipped(pack_frame([0, {"reply": "x" * 40}]), index), ends=False)


@pytest.mark.parametrize(
    "frame",
    [
        pack_frame([0]),
        pack_frame([7, {"reply": 1}]),
        pack_frame([[], {"reply": 1}]),
        pack_frame(["0", None]),
        pack_frame([]),
        b"GET / HTTP/1.1\r\n\r\n",
        pack_frame([0, {"reply": "x" * 100}])[:-1],
    ],
)
def test_a_malformed_answer_ends_the_link(frame: bytes) -> None:
    broken_by(frame, ends=True)


def test_a_stranger_without_the_secret_is_not_served() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            address = await router.server.start("node")
            with pytest.raises(ConnectionError):
                await CallLink.open(replace(address, secret="x" * 64), None)
            own = link.call(wire("a"))
            await router.asked("a")
            assert set(router.replies) == {"a"}
            router.replies["a"].set_result({"reply": 1})
            await own

    run(test)


def test_a_number_that_comes_twice_ends_its_link_and_no_other() -> None:
    async def test() -> None:
        async with linked() as (router, link):
            other = await CallLink.open(await router.server.start("node"), None)
            calls = [link.call(wire("a")), other.call(wire("b"))]
            await router.asked("a", "b")
            link._writer.write(pack_frame([0, wire("again")]))
            with pytest.raises(LinkBrokenError):
                await calls[0]
            await happens(lambda: router.cancelled == ["a"])
            router.replies["b"].set_result({"reply": 1})
            assert await calls[1] == {"reply": 1}
            other.close()

    run(test)


def test_a_link_is_silent_once_no_answer_comes_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(call_link, "time", SimpleNamespace(monotonic=lambda: now_s))

    async def test() -> None:
        nonlocal now_s
        async with linked() as (router, link):
            now_s += 1000
            first, second = link.call(wire("a")), link.call(wire("b"))
            await router.asked("a", "b")
            assert not link.is_silent()
            now_s += 1.9
            router.replies["a"].set_result({"reply": 1})
            await first
            now_s += 1.9  # since the latest answer
            assert not link.is_silent()
            now_s += 0.2
            assert link.is_silent()
            router.replies["b"].set_result({"reply": 1})
            await second
            assert not link.is_silent()  # it owes nothing

    run(test)


def test_a_link_with_tls_serves_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        ours, theirs = (new_authority(tmp_path / name) for name in ("ours", "theirs"))
        router = Router(ours.server)
        address = await router.server.start("another node")
        link = await CallLink.open(address, ours.client)
        call = link.call(wire("a"))
        await router.asked("a")
        router.replies["a"].set_result({"reply": 1})
        assert await call == {"reply": 1}
        link.close()
        monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.2)  # each waits for the other
        with pytest.raises(TimeoutError):
            await CallLink.open(address, None)
        monkeypatch.undo()
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await CallLink.open(address, theirs.client)
        router.server.close()

    run(test)
