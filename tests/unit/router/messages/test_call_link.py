"""Calls over call links on loopback: replies, cancellations, damage, ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router.messages import call_link
from router.messages.call_link import CallLink, CallServer, LinkBrokenError, LinkCall
from router.messages.link import pack_frame
from router.messages.prediction import PredictionReply, PredictionRequest
from tests.unit.certificates import new_authority
from tests.unit.router.messages.handshakes import LIMIT_S, by_tcp, flipped, happens, listens, looped


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

    async def answer(self, call: LinkCall, name: str) -> None:
        """Answer a request once it has come, and check what its call returns."""
        await self.asked(name)
        self.replies[name].set_result({"reply": name})
        assert await call == {"reply": name}


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
@looped
async def test_a_request_and_its_reply_arrive_whole(num_rows: int) -> None:
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


@looped
async def test_calls_are_answered_in_any_order() -> None:
    async with linked() as (router, link):
        calls = {name: link.call(wire(name)) for name in "abc"}
        await router.asked(*"abc")
        assert link.num_unanswered == 3
        for name in "cab":
            await router.answer(calls[name], name)
        assert link.num_unanswered == 0


@looped
async def test_a_cancelled_call_ends_at_the_router_and_its_number_is_free_again() -> None:
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
        await router.answer(kept, "kept")
        kept.cancel()
        for call in (left, at_once):
            with pytest.raises(asyncio.CancelledError):
                await call


@looped
async def test_an_error_that_nobody_foresaw_is_internal_and_the_link_lives() -> None:
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
        await router.answer(link.call(wire("c")), "c")


@pytest.mark.parametrize("who", ["router", "gateway"])
@looped
async def test_when_a_link_ends_its_calls_fail_and_the_requests_end(who: str) -> None:
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


@looped
async def test_a_link_that_is_left_gives_the_answers_that_are_owed_and_ends() -> None:
    async with linked() as (router, link):
        call = link.call(wire("a"))
        await router.asked("a")
        link.leave()
        assert not link.is_open
        await router.answer(call, "a")
        await happens(lambda: not router.server._writers)
    async with linked() as (router, link):
        link.leave()
        await happens(lambda: not router.server._writers)


REPLY = pack_frame([0, {"reply": "x" * 40}])
DAMAGED = {f"byte {i}": flipped(REPLY, i) for i in (2, 9, 14, 40)}
ENDED = {
    "no reply": pack_frame([0]),
    "no such call": pack_frame([7, {"reply": 1}]),
    "an array for a number": pack_frame([[], {"reply": 1}]),
    "a text for a number": pack_frame(["0", None]),
    "nothing": pack_frame([]),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "a part": REPLY[:-1],
}
"""After these bytes the router ends the connection, since a link may wait for more."""


@pytest.mark.parametrize("name", [*DAMAGED, *ENDED])
@looped
async def test_a_damaged_or_malformed_answer_is_no_reply_and_ends_the_link(name: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await listens(reader, writer, b"secret")
        await reader.read(1 << 16)
        writer.write((DAMAGED | ENDED)[name])
        if name in ENDED:
            writer.write_eof()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    link = await CallLink.open(by_tcp(server.sockets[0].getsockname()[1]), None)
    with pytest.raises(LinkBrokenError):
        async with asyncio.timeout(LIMIT_S):
            await link.call(wire("a"))
    server.close()


@looped
async def test_a_number_that_comes_twice_ends_its_link_and_no_other() -> None:
    async with linked() as (router, link):
        other = await CallLink.open(await router.server.start("node"), None)
        calls = [link.call(wire("a")), other.call(wire("b"))]
        await router.asked("a", "b")
        link._writer.write(pack_frame([0, wire("again")]))
        with pytest.raises(LinkBrokenError):
            await calls[0]
        await happens(lambda: router.cancelled == ["a"])
        await router.answer(calls[1], "b")
        other.close()


@looped
async def test_a_link_is_silent_once_no_answer_comes_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(call_link, "time", SimpleNamespace(monotonic=lambda: now_s))

    async with linked() as (router, link):
        now_s += 1000
        first, second = link.call(wire("a")), link.call(wire("b"))
        await router.asked("a", "b")
        assert not link.is_silent()
        now_s += 1.9
        await router.answer(first, "a")
        now_s += 1.9  # since the latest answer
        assert not link.is_silent()
        now_s += 0.2
        assert link.is_silent()
        await router.answer(second, "b")
        assert not link.is_silent()  # it owes nothing


@looped
async def test_over_tls_a_link_serves_and_others_are_refused(tmp_path: Path) -> None:
    ours, theirs = (new_authority(tmp_path / name) for name in ("ours", "theirs"))
    router = Router(ours.server)
    address = await router.server.start("another node")
    link = await CallLink.open(address, ours.client)
    await router.answer(link.call(wire("a")), "a")
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        await CallLink.open(address, theirs.client)
    link.close()
    router.server.close()
