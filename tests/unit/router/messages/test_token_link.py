"""The token link over loopback, and the joining of its events with the call's own reply."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.messages import link as link_module
from router.messages import token_link
from router.messages.link import LinkAddress
from router.messages.receipts import DeliveredTokens
from router.messages.request import (
    GenerationRequest,
    PromptLogprobs,
    Received,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from router.messages.token_link import TokenReceiver, TokenSender
from tests.unit.router.messages.handshakes import (
    LIMIT_S,
    by_tcp,
    flipped,
    framed,
    happens,
    listens,
    looped,
    packed,
)

EVENT = TokenEvent(
    1, (5, 6), (TokenLogprobs(-0.5, (5,), (-0.5,)), TokenLogprobs(-1.5, (), ())), "stop", False, 3
)


class Gateway:
    """A link's server, what came to it, and which requests it still wants."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[str, TokenEvent]] = asyncio.Queue()
        self.unwanted: set[str] = set()
        self.alone: list[tuple[str, bool]] = []
        self.server = TokenReceiver("node", "127.0.0.1", self._on_tokens, self._on_alone)

    def _on_tokens(self, request_id: str, event: TokenEvent) -> bool:
        self.received.put_nowait((request_id, event))
        return request_id not in self.unwanted

    def _on_alone(self, request_id: str, is_alone: bool) -> None:
        self.alone.append((request_id, is_alone))

    async def next(self) -> tuple[str, TokenEvent]:
        return await asyncio.wait_for(self.received.get(), LIMIT_S)


class Router:
    """A link's client, and the stops that came to it."""

    def __init__(self) -> None:
        self.stops: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.client = TokenSender(
            lambda request_id, index: self.stops.put_nowait((request_id, index))
        )

    async def link(self, address: LinkAddress) -> None:
        """Connect, and wait for the link."""
        self.client.connect(address)
        await happens(lambda: address in self.client._links)

    async def next_stop(self) -> tuple[str, int]:
        return await asyncio.wait_for(self.stops.get(), LIMIT_S)


@asynccontextmanager
async def linked(
    num_routers: int = 1, waits: bool = True
) -> AsyncIterator[tuple[Gateway, LinkAddress, list[Router]]]:
    """A gateway, its address, and routers, which are linked where it ``waits`` for that."""
    gateway, routers = Gateway(), [Router() for _ in range(num_routers)]
    address = await gateway.server.start()
    for router in routers if waits else ():
        await router.link(address)
    try:
        yield gateway, address, routers
    finally:
        for router in routers:
            router.client.close()
        gateway.server.close()


def event_of(start: int, *token_ids: int) -> TokenEvent:
    return TokenEvent(0, token_ids, start=start)


@looped
async def test_events_arrive_whole_and_in_order() -> None:
    async with linked() as (gateway, address, [router]):
        sent = [(f"r{i % 3}", event_of(i, i, i + 1)) for i in range(300)]
        for i in range(0, 300, 3):
            router.client.send(address, sent[i : i + 3])
        router.client.send(address, [("last", EVENT)])
        assert [await gateway.next() for _ in range(300)] == sent
        assert await gateway.next() == ("last", EVENT)


@looped
async def test_a_step_alone_is_told_before_it_begins_in_order_with_tokens() -> None:
    async with linked() as (gateway, address, [router]):
        assert await router.client.send_alone(address, "r", True)
        router.client.send(address, [("r", EVENT)])
        assert await router.client.send_alone(address, "r", False)
        assert await gateway.next() == ("r", EVENT)
        await happens(lambda: len(gateway.alone) == 2)
        assert gateway.alone == [("r", True), ("r", False)]
        nobody = by_tcp(1, "")
        assert not await router.client.send_alone(nobody, "r", True)


@looped
async def test_a_stop_travels_back_to_the_router_that_serves_the_request_now() -> None:
    async with linked(2) as (gateway, address, [first, second]):
        for router, request_id in ((first, "a"), (second, "b"), (second, "c"), (first, "c")):
            router.client.send(address, [(request_id, EVENT)])
            await gateway.next()
        for request_id, index in (("b", 2), ("a", 0), ("unknown", 0), ("c", 1)):
            gateway.server.stop_choice(request_id, index)
        assert await second.next_stop() == ("b", 2)
        assert [await first.next_stop() for _ in range(2)] == [("a", 0), ("c", 1)]
        second.client.close()  # its end must not take the other's route away
        await happens(lambda: len(set(gateway.server._routes.values())) == 1)
        gateway.server.stop_choice("c", 3)
        assert await first.next_stop() == ("c", 3)
        assert second.stops.empty()


@looped
async def test_a_forgotten_request_is_not_remembered_again_by_late_tokens() -> None:
    async with linked() as (gateway, address, [router]):
        router.client.send(address, [("a", EVENT), ("b", EVENT)])
        for _ in range(2):
            await gateway.next()
        gateway.server.forget("a")
        gateway.server.forget("unknown")
        gateway.unwanted.add("a")
        router.client.send(address, [("a", EVENT)])
        await gateway.next()
        assert list(gateway.server._routes) == ["b"]
        gateway.server.stop_choice("a", 0)
        gateway.server.stop_choice("b", 0)
        assert await router.next_stop() == ("b", 0)


DAMAGED = {f"byte {i}": flipped(framed([["a", EVENT.to_wire()]]), i) for i in (1, 5, 9, 12, 30)} | {
    "too long": packed(b"x", token_link.MAX_FRAME_BYTES + 1)
}


@pytest.mark.parametrize("sent", DAMAGED.values(), ids=DAMAGED)
@looped
async def test_a_damaged_frame_is_no_token_and_ends_its_link_alone(sent: bytes) -> None:
    async with linked(2) as (gateway, address, [first, second]):
        first.client.send(address, [("a", EVENT)])
        await gateway.next()
        first.client._links[address].write(sent)
        await happens(lambda: not first.client._links)  # the gateway has closed it
        assert gateway.server._routes == {}
        assert gateway.received.empty()
        for router in (second, first):
            await router.link(address)
            router.client.send(address, [("b", EVENT)])
            assert await gateway.next() == ("b", EVENT)


@looped
async def test_a_router_whose_link_broke_links_again() -> None:
    async with linked() as (gateway, address, [router]):
        router.client.connect(address)  # has a link: keeps it
        router.client.send(address, [("a", EVENT)])
        await gateway.next()
        assert len(set(gateway.server._routes.values())) == 1
        router.client._links[address].transport.abort()
        router.client.send(address, [("lost", EVENT)])  # dropped; the reply has it
        await happens(lambda: not gateway.server._routes)
        await router.link(address)
        router.client.send(address, [("b", EVENT)])
        assert await gateway.next() == ("b", EVENT)
        gateway.server.stop_choice("b", 0)
        assert await router.next_stop() == ("b", 0)


@pytest.mark.parametrize("is_late", [False, True], ids=["same node", "later node"])
@looped
async def test_a_gateway_without_a_socket_for_a_router_is_logged_once_and_reached_once_it_has_one(
    caplog: pytest.LogCaptureFixture, is_late: bool
) -> None:
    caplog.set_level("WARNING", "expertmesh.link")
    async with linked(waits=False) as (gateway, alone, [router]):
        # The router is on a node that came later, or in another network namespace of the node.
        seen = alone.seen_from("later") if is_late else replace(alone, name=b"\0expertmesh-gone")
        for _ in range(5):
            router.client.connect(seen)
            router.client.send(seen, [("a", EVENT)])
            await happens(lambda: not router.client._unsent)
        assert not await router.client.send_alone(seen, "a", True)

        gateway.server.expect("later")
        address = await gateway.server.start()
        way = address.seen_from("later") if is_late else address.seen_from("node")
        router.client.connect(way)
        router.client.send(way, [("b", EVENT)])
        assert await gateway.next() == ("b", EVENT)
        [writer] = router.client._links.values()
        family = socket.AF_INET if is_late else socket.AF_UNIX
        assert writer.get_extra_info("socket").family == family
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"no link to a gateway ({'no socket' if is_late else 'unix'}, ")
    assert line.endswith("its tokens come with the reply")


LOST = LinkAddress("node", "secret", host="192.0.2.1", port=9)


class Network:
    """Connections to :data:`LOST` that are never made, and the attempts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attempts = 0
        self._connect = asyncio.open_connection
        monkeypatch.setattr(link_module.asyncio, "open_connection", self)

    async def __call__(self, host: str, port: int, **options: Any) -> Any:
        if host == LOST.host:
            self.attempts += 1
            await asyncio.Event().wait()
        return await self._connect(host, port, **options)


@looped
async def test_requests_of_an_unreachable_gateway_wait_neither_for_it_nor_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(monkeypatch)
    clock_s = 100.0
    monkeypatch.setattr(token_link, "time", SimpleNamespace(monotonic=lambda: clock_s))
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.05)
    async with linked(waits=False) as (gateway, address, [router]):
        for number in range(20):
            router.client.connect(LOST)
            router.client.send(LOST, [(f"lost {number}", EVENT)])
        router.client.connect(address)  # another gateway is linked meanwhile
        router.client.send(address, [("a", EVENT)])
        assert await gateway.next() == ("a", EVENT)
        await happens(lambda: LOST not in router.client._unsent)
        router.client.connect(LOST)  # known to be unreachable
        assert network.attempts == 1
        assert LOST not in router.client._unsent
        clock_s += token_link.UNREACHABLE_S
        router.client.connect(LOST)
        await happens(lambda: network.attempts == 2)


@looped
async def test_tokens_sampled_before_the_link_is_there_are_sent_in_order_once_it_is() -> None:
    async with linked(waits=False) as (gateway, address, [router]):
        router.client.connect(address)
        sent = [("a", event_of(i, i)) for i in range(50)]
        for number, event in enumerate(sent):
            router.client.send(address, [event])
            if number % 7 == 0:  # the connection comes at one of these
                await asyncio.sleep(0)
        assert [await gateway.next() for _ in sent] == sent


@looped
async def test_tokens_that_wait_for_a_link_take_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Network(monkeypatch)
    monkeypatch.setattr(token_link, "MAX_BUFFERED_BYTES", 1 << 16)
    caplog.set_level("WARNING", "expertmesh.link")  # a fuzz target of this process hides it
    router = Router()
    router.client.connect(LOST)
    for number in range(100):
        router.client.send(LOST, [("a", event_of(number, *range(1000)))])
        assert len(router.client._unsent[LOST]) <= 1 << 16
    router.client.close()
    assert "slow to connect" in caplog.text


@looped
async def test_a_gateway_that_does_not_read_is_cut_off_at_a_bounded_backlog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_link, "MAX_BUFFERED_BYTES", 1 << 16)

    writers: list[asyncio.StreamWriter] = []

    async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await listens(reader, writer, b"secret")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writers.append(writer)  # from Python 3.13 on a lost writer closes its connection

    server = await asyncio.start_server(never_reads, "127.0.0.1", 0, limit=1024)
    address = by_tcp(server.sockets[0].getsockname()[1])
    router = Router()
    await router.link(address)
    writer = router.client._links[address]
    big = [("a", event_of(0, *range(20_000)))]
    async with asyncio.timeout(LIMIT_S):
        while (backlog := writer.transport.get_write_buffer_size()) <= 1 << 16:
            router.client.send(address, big)
            await asyncio.sleep(0)
    assert backlog < 1 << 18
    assert not writer.is_closing()
    router.client.send(address, big)
    assert writer.is_closing()  # not seconds later, by the system's timeout
    router.client.close()
    server.close()


# Joining the link's events with the reply.


def receipts_of(n: int, *received: Received) -> DeliveredTokens:
    """What has been passed on of a request with ``n`` choices."""
    sampling = SamplingParams(max_tokens=8, n=n)
    return DeliveredTokens(GenerationRequest("r", "m", (1,), sampling, 0.0, received=received))


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[TokenEvent], list[TokenEvent]]:
    """Events as the link may bring them (steps, some lost), and the reply's, one per choice."""
    link: list[TokenEvent] = []
    reply: list[TokenEvent] = []
    per_choice: list[list[TokenEvent]] = []
    for index in range(draw(st.integers(1, 3))):
        token_ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=8))
        rows = tuple(TokenLogprobs(-float(t), (), ()) for t in token_ids)
        with_logprobs = draw(st.booleans())
        reason = draw(st.sampled_from(["stop", "length"]))
        cuts = draw(st.sets(st.integers(1, len(token_ids)), max_size=len(token_ids)))
        bounds = [0, *sorted(cuts | {len(token_ids)})]
        late_finish = draw(st.booleans())  # a stop that came from the gateway has no token
        steps = [
            TokenEvent(
                index,
                tuple(token_ids[start:end]),
                rows[start:end] if with_logprobs else (),
                reason if end == len(token_ids) and not late_finish else None,
                start=start,
            )
            for start, end in itertools.pairwise(bounds)
        ]
        if late_finish:
            steps.append(TokenEvent(index, (), (), reason, start=len(token_ids)))
        per_choice.append([step for step in steps if draw(st.integers(0, 3)) > 0])
        reply.append(
            TokenEvent(index, tuple(token_ids), rows if with_logprobs else (), reason, start=0)
        )
    while any(per_choice):
        waiting = [events for events in per_choice if events]
        link.append(waiting[draw(st.integers(0, len(waiting) - 1))].pop(0))
    return link, reply


def check(passed: list[TokenEvent], reply: list[TokenEvent]) -> None:
    """Check that what was passed on is the reply, each token once and in order."""
    for whole in reply:
        own = [event for event in passed if event.index == whole.index]
        assert tuple(t for event in own for t in event.token_ids) == whole.token_ids
        assert tuple(row for event in own for row in event.logprobs) == whole.logprobs
        reasons = [event.finish_reason for event in own]
        assert reasons == [*[None] * (len(own) - 1), whole.finish_reason]
        lengths = [len(event.token_ids) for event in own]
        assert [event.start for event in own] == [sum(lengths[:i]) for i in range(len(own))]


@settings(max_examples=300)
@given(deliveries(), st.data())
def test_whatever_the_link_loses_each_token_is_passed_on_once_and_in_order(
    delivery: tuple[list[TokenEvent], list[TokenEvent]], data: st.DataObject
) -> None:
    link, reply = delivery
    # The reply may overtake what is still under way on the link.
    split = data.draw(st.integers(0, len(link)))
    # A request that was sent again brings everything from the start again.
    again = data.draw(st.booleans())
    arriving = [*link[:split], *(link if again else []), *reply, *link[split:]]
    receipts = receipts_of(len(reply))
    check([fresh for event in arriving if (fresh := receipts.take(event)) is not None], reply)
    assert receipts.all_finished()


@settings(max_examples=200)
@given(deliveries(), st.data())
def test_a_request_that_goes_on_elsewhere_loses_nothing_and_doubles_nothing(
    delivery: tuple[list[TokenEvent], list[TokenEvent]], data: st.DataObject
) -> None:
    link, reply = delivery
    died = data.draw(st.integers(0, len(link)))
    receipts = receipts_of(len(reply))
    before = [fresh for event in link[:died] if (fresh := receipts.take(event)) is not None]
    received = receipts.received()
    resumed = receipts_of(len(reply), *received)
    assert resumed.received() == received
    rest = [
        replace(
            whole,
            token_ids=whole.token_ids[(have := len(one.token_ids)) :],
            logprobs=whole.logprobs[have:],
            start=have,
        )
        for whole, one in zip(reply, received, strict=True)
        if not one.finished
    ]
    after = [fresh for event in rest if (fresh := resumed.take(event)) is not None]
    assert after == rest
    check([*before, *after], reply)


def test_a_stopped_choice_is_told_as_finished() -> None:
    receipts = receipts_of(2)
    receipts.take(event_of(0, 7))
    assert receipts.received({1}) == (Received((7,)), Received((), True))
    assert not receipts.all_finished()


@looped
async def test_events_of_a_step_that_are_too_large_for_a_frame_come_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_link, "MAX_FRAME_BYTES", 2000)
    rows = tuple(PromptLogprobs(-float(i), (i,), (-0.5,), i) for i in range(40))
    events = [
        (f"r{i}", TokenEvent(0, (), prompt_logprobs=rows[: 10 * i], prompt_start=i))
        for i in range(1, 5)
    ]
    too_large = ("large", TokenEvent(0, (), prompt_logprobs=rows * 3))

    async with linked() as (gateway, address, [router]):
        router.client.send(address, [*events[:2], too_large, *events[2:]])
        router.client.send(address, [("last", EVENT)])
        assert [await gateway.next() for _ in range(5)] == [*events, ("last", EVENT)]
