"""Streams between a router and actors in one process: what they carry, and what they refuse."""

from __future__ import annotations

import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.transport.base import Call, CallFailure, Outcome
from cluster.transport.stream import channel as channel_module
from cluster.transport.stream import late as late_module
from cluster.transport.stream import server as server_module
from cluster.transport.stream.channel import BUFFER_BYTES, Channel
from cluster.transport.stream.client import WINDOW, StreamTransport
from cluster.transport.stream.connect import Connector, greet, open_socket
from cluster.transport.stream.handshake import (
    HELLO_BYTES,
    Network,
    Side,
    StreamOffer,
    new_nonce,
    proof,
)
from cluster.transport.stream.server import StreamServer
from cluster.wire.frames import Buffer, Buffers
from tests.local_cluster import Answered, within
from tests.unit.certificates import Authority, new_authority
from tests.unit.cluster.transport.channels import read_messages

LIMIT_S = 60.0
NETWORKS = list(Network)
pytestmark = pytest.mark.usefixtures("native")


class Echo:
    """Answers every frame with itself, once the gate is open; keeps what it was asked together."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.answer: Callable[[bytes], Buffers] = lambda frame: (frame[:1], frame[1:])

    def shut(self) -> None:
        """Close the gate, and forget who has come to it."""
        self.open.clear()
        while self.entered.acquire(blocking=False):
            pass

    def __call__(self, frames: Sequence[Buffer]) -> list[Buffers]:
        batch = [bytes(frame) for frame in frames]
        self.batches.append(batch)
        self.entered.release()
        assert self.open.wait(LIMIT_S)
        return [self.answer(frame) for frame in batch]


@dataclass
class Elsewhere:
    """A fall-back transport that answers everything by ``elsewhere``."""

    frames: list[tuple[str, bytes]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def send(self, calls: Sequence[Call]) -> Answered:
        self.frames += [(call.actor_id, b"".join(call.frame)) for call in calls]
        return Answered([b"elsewhere"] * len(calls))

    def renew(self, actor_id: str) -> None:
        """There is no connection to renew."""

    def close(self) -> None:
        """There is nothing to close."""


class Actors:
    """Stream servers by actor id, and the offers that they make."""

    def __init__(self) -> None:
        self.servers: dict[tuple[str, int], StreamServer] = {}
        self.echoes: dict[str, Echo] = {}
        self.asked: list[tuple[str, int, Network]] = []
        self.networks = NETWORKS
        self.altered: Callable[[StreamOffer], StreamOffer] = lambda offer: offer

    def add(
        self, actor_id: str, generation: int = 1, tls: ssl.SSLContext | None = None
    ) -> StreamServer:
        echo = self.echoes[actor_id] = Echo()
        server = self.servers[actor_id, generation] = StreamServer(echo, "127.0.0.1", tls)
        return server

    def ask(
        self, actor_id: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer | None:
        self.asked.append((actor_id, generation, network))
        server = self.servers.get((actor_id, generation))
        if server is None:
            return None
        if network not in self.networks:
            # As an actor of another host, whose Unix sockets are not to be found here.
            return StreamOffer(network, b"\0no-such-name", bytes(16), bytes(32))
        return self.altered(server.offer(network))


@pytest.fixture
def actors() -> Iterator[Actors]:
    actors = Actors()
    yield actors
    for echo in actors.echoes.values():
        echo.open.set()
    for server in actors.servers.values():
        server.close()


Open = Callable[..., StreamTransport]


@pytest.fixture
def connect(actors: Actors) -> Iterator[Open]:
    """Open transports; a call waits for its stream unless a fall-back is given."""
    opened: list[StreamTransport] = []

    def connected(
        fallback: Elsewhere | None = None, tls: ssl.SSLContext | None = None
    ) -> StreamTransport:
        opened.append(StreamTransport(Connector(actors.ask, tls), fallback))
        return opened[-1]

    yield connected
    for transport in opened:
        transport.close()


def call(frame: bytes, actor_id: str = "a", generation: int = 1) -> Call:
    return Call(actor_id, generation, (frame[:3], frame[3:]), LIMIT_S)


def answers(outcomes: Sequence[Outcome]) -> list[bytes | CallFailure]:
    return [o if isinstance(o, CallFailure) else bytes(o) for o in outcomes]


def ask(
    transport: StreamTransport, *calls: Call, timeout_s: float = LIMIT_S
) -> list[bytes | CallFailure]:
    return answers(transport.send(within(timeout_s, calls)).wait())


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, what
        tick.wait(0.005)


def greeted(actors: Actors, actor_id: str = "a", network: Network = Network.UNIX) -> Channel:
    """A connection that has been admitted, to do with as a test likes."""
    offer = actors.servers[actor_id, 1].offer(network)
    return greet(open_socket(offer, None), offer)


def test_a_renewed_connection_is_another_one_and_calls_go_elsewhere_until_it_is_there(
    actors: Actors, connect: Open
) -> None:
    actors.add("a")
    elsewhere = Elsewhere()
    transport = connect(elsewhere)
    until(lambda: ask(transport, call(b"hello")) == [b"hello"], "it streams")
    offers, before = len(actors.asked), len(elsewhere.frames)
    transport.renew("a")
    transport.renew("never was")
    assert ask(transport, call(b"hello")) == [b"elsewhere"]
    until(lambda: ask(transport, call(b"hello")) == [b"hello"], "it streams again")
    assert len(actors.asked) == offers + 1
    assert len(elsewhere.frames) > before


# What streams carry.


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, BUFFER_BYTES, 3_000_000, 20_000_000])
def test_a_frame_of_any_size_comes_back(
    actors: Actors, connect: Open, network: Network, size: int
) -> None:
    actors.add("a")
    actors.networks = [network]
    frame = secrets.token_bytes(size)
    transport = connect()
    for _ in range(2):  # buffers that have grown are used again
        assert ask(transport, call(frame)) == [frame]
    assert ask(transport, call(b"small")) == [b"small"]
    assert transport.calls == {"stream": 3}
    # The Unix name of an actor on another host is not there, and TCP is tried then.
    networks = [Network.UNIX] if network is Network.UNIX else [Network.UNIX, Network.TCP]
    assert actors.asked == [("a", 1, one) for one in networks]


def test_no_calls_have_no_outcomes(connect: Open) -> None:
    assert ask(connect()) == []


def test_answers_come_in_the_order_of_the_calls_whoever_is_first(
    actors: Actors, connect: Open
) -> None:
    for name in "abc":
        actors.add(name)
    transport = connect()
    ask(transport, *(call(b"hello", name) for name in "abc"))
    actors.echoes["a"].open.clear()
    pending = transport.send(within(LIMIT_S, [call(name.encode() * 9, name) for name in "abc"]))
    threading.Timer(0.05, actors.echoes["a"].open.set).start()
    assert answers(pending.wait()) == [b"a" * 9, b"b" * 9, b"c" * 9]


def test_flights_may_be_waited_for_in_any_order(actors: Actors, connect: Open) -> None:
    actors.add("a")
    actors.add("b")
    transport = connect()
    frames = [secrets.token_bytes(50_000) for _ in range(6)]
    pending_calls = [
        transport.send(within(LIMIT_S, [call(frame, "a"), call(frame[::-1], "b")]))
        for frame in frames
    ]
    kept = {i: answers(pending_calls[i].wait()) for i in (5, 0, 3, 1, 4, 2)}
    assert kept == {i: [frame, frame[::-1]] for i, frame in enumerate(frames)}


def test_answers_of_a_flight_last_while_others_come_in(actors: Actors, connect: Open) -> None:
    actors.add("a")
    actors.add("b")
    transport = connect()
    first, second = (secrets.token_bytes(9000) for _ in range(2))
    actors.echoes["b"].open.clear()
    early = transport.send(within(LIMIT_S, [call(first, "a"), call(first, "b")]))
    late = transport.send(within(LIMIT_S, [call(second, "a")]))
    assert answers(late.wait()) == [second]
    actors.echoes["b"].open.set()
    assert answers(early.wait()) == [first, first]


def test_frames_that_wait_together_are_computed_together_and_each_answer_is_sent_as_it_comes(
    actors: Actors, connect: Open
) -> None:
    both, has_first = threading.Event(), threading.Event()

    def one_by_one(frames: Sequence[Buffer]) -> Iterator[Buffers]:
        for number, frame in enumerate(frames):
            if number:
                both.set()
                assert has_first.wait(LIMIT_S)
            yield (bytes(frame),)

    server = actors.add("a")
    routers = [connect() for _ in range(2)]
    for router in routers:
        ask(router, call(b"hello"))
    echo = actors.echoes["a"]
    echo.shut()
    busy = routers[0].send(within(LIMIT_S, [call(b"busy")]))
    assert echo.entered.acquire(timeout=LIMIT_S)
    pending_calls = [router.send(within(LIMIT_S, [call(b"later")])) for router in routers]
    server._answer = one_by_one
    echo.open.set()
    assert answers(busy.wait()) == [b"busy"]
    waits = [threading.Thread(target=pending.wait) for pending in pending_calls]
    for wait in waits:
        wait.start()
    # They came in one batch; the second is not computed before the first router has its own.
    assert both.wait(LIMIT_S)
    deadline_s = time.monotonic() + LIMIT_S
    while all(wait.is_alive() for wait in waits):
        assert time.monotonic() < deadline_s
        waits[0].join(0.01)
    has_first.set()
    for wait in waits:
        wait.join(LIMIT_S)
    assert [answers(pending.wait()) for pending in pending_calls] == [[b"later"]] * 2


def test_an_actor_is_ready_once_a_stream_is_made_and_nobody_waits_for_it(
    actors: Actors, connect: Open
) -> None:
    transport = connect()
    actors.add("a", 1)
    assert not transport.is_ready("a", 1)
    until(lambda: transport.is_ready("a", 1), "the stream is made")
    actors.add("a", 2)
    assert not transport.is_ready("a", 2)
    until(lambda: transport.is_ready("a", 2), "the stream to its successor is made")
    assert ask(transport, call(b"x", generation=2)) == [b"x"]
    assert actors.echoes["a"].batches == [[b"x"]]


# What happens when they do not.


def test_without_a_fall_back_an_unknown_actor_has_died(
    connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_s = time.monotonic()
    assert ask(connect(), call(b"x"), timeout_s=5 * LIMIT_S) == [CallFailure.DIED]
    assert time.monotonic() - started_s < LIMIT_S


def test_a_call_under_way_goes_elsewhere_when_its_stream_breaks_though_the_other_actor_hangs(
    actors: Actors, connect: Open
) -> None:
    actors.add("a")
    actors.add("b")
    other = Elsewhere()
    transport = connect(other)
    calls = [call(b"one", "a"), call(b"two", "b")]
    until(lambda: ask(transport, *calls) == [b"one", b"two"], "both streams are there")
    other.frames.clear()
    for echo in actors.echoes.values():
        echo.open.clear()
    pending = transport.send(within(LIMIT_S, calls))
    first, last = (calls[index].actor_id for index in pending.unanswered.values())  # type: ignore[attr-defined]
    outcomes: list[Outcome] = []
    waiting = threading.Thread(target=lambda: outcomes.extend(pending.wait()))
    waiting.start()
    transport.links[first].channel.sock.shutdown(socket.SHUT_RDWR)
    until(lambda: [actor_id for actor_id, _ in other.frames] == [first], "it is asked elsewhere")
    assert waiting.is_alive()
    actors.echoes[last].open.set()
    waiting.join(LIMIT_S)
    whole = {"a": b"one", "b": b"two"} | {first: b"elsewhere"}
    assert answers(outcomes) == [whole["a"], whole["b"]]
    actors.echoes[first].open.set()
    until(lambda: ask(transport, *calls) == [b"one", b"two"], "it is connected again")


def test_answers_that_came_in_time_count_when_the_router_itself_is_late(
    actors: Actors, connect: Open
) -> None:
    for actor_id in "abc":
        actors.add(actor_id)
    transport = connect()
    frames = [b"a", b"b", secrets.token_bytes(4 * BUFFER_BYTES)]  # which takes several reads
    calls = [call(frame, actor_id) for frame, actor_id in zip(frames, "abc", strict=True)]
    assert ask(transport, *calls) == frames
    pending = transport.send(within(0.05, calls))
    over_s = time.monotonic() + 0.05
    channels = [link.channel for link in transport.links.values()]
    until(lambda: not any(channel.outgoing for channel in channels), "the frames have left")
    until(lambda: all(select.select([c.sock], [], [], 0)[0] for c in channels), "answers")
    until(lambda: time.monotonic() > over_s, "the time is over")
    assert answers(pending.wait()) == frames


def test_an_answer_that_never_ends_is_given_up(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_module, "LATE_READ_S", 0.2)
    actors.add("a")
    transport = connect()
    ask(transport, call(b"hello"))
    [link] = transport.links.values()
    monkeypatch.setattr(link.channel, "receive", lambda wait_ms=0: [])
    pending = transport.send(within(0.0, [call(b"x")]))  # its answer stays unread
    started_s = time.monotonic()
    assert answers(pending.wait()) == [CallFailure.TIMED_OUT]
    assert time.monotonic() - started_s < LIMIT_S


def test_a_call_that_another_actor_can_answer_is_lost_at_once_when_its_stream_breaks(
    actors: Actors, connect: Open
) -> None:
    actors.add("a")
    other = Elsewhere()
    transport = connect(other)
    replaceable = call(b"one")._replace(replaceable=True)
    # Before there is a connection nothing speaks against the actor.
    assert ask(transport, replaceable) in ([b"elsewhere"], [b"one"])
    until(lambda: ask(transport, replaceable) == [b"one"], "a stream is made")
    other.frames.clear()
    actors.echoes["a"].open.clear()
    pending = transport.send(within(LIMIT_S, [replaceable]))
    [link] = transport.links.values()
    link.channel.sock.shutdown(socket.SHUT_RDWR)
    assert answers(pending.wait()) == [CallFailure.DIED]
    assert other.frames == []


def test_an_actor_that_is_gone_is_waited_for_no_longer(actors: Actors, connect: Open) -> None:
    actors.add("a")
    actors.add("b")
    transport = connect()
    calls = [call(b"one", "a"), call(b"two", "b")]
    until(lambda: ask(transport, *calls) == [b"one", b"two"], "both streams are there")
    actors.echoes["a"].open.clear()
    pending = transport.send(within(10 * LIMIT_S, calls))
    started_s = time.monotonic()
    outcomes = pending.wait(lambda one, silent_s: one.actor_id == "a")
    assert answers(outcomes) == [CallFailure.DIED, b"two"]
    assert time.monotonic() - started_s < LIMIT_S
    awaited = [list(link.unanswered.values()) for link in transport.links.values()]
    assert awaited == [[None], []], "nothing of the pending is kept"
    actors.echoes["a"].open.set()
    until(lambda: ask(transport, *calls) == [b"one", b"two"], "late answers disturb nobody")


def test_without_a_fall_back_a_broken_stream_is_a_death_and_is_made_again(
    actors: Actors, connect: Open
) -> None:
    actors.add("a")
    transport = connect()
    assert ask(transport, call(b"x")) == [b"x"]
    [link] = transport.links.values()
    link.channel.sock.shutdown(socket.SHUT_RDWR)
    assert ask(transport, call(b"x")) in ([CallFailure.DIED], [b"x"])
    until(lambda: ask(transport, call(b"x")) == [b"x"], "it is connected again")


def test_late_answers_are_ignored_and_never_taken_for_another_calls(
    actors: Actors, connect: Open
) -> None:
    actors.add("a")
    transport = connect()
    ask(transport, call(b"hello"))
    actors.echoes["a"].open.clear()
    assert ask(transport, call(b"late 1"), timeout_s=0.05) == [CallFailure.TIMED_OUT]
    assert ask(transport, call(b"late 2"), timeout_s=0.05) == [CallFailure.TIMED_OUT]
    pending = transport.send(within(LIMIT_S, [call(b"patient")]))
    actors.echoes["a"].open.set()
    assert answers(pending.wait()) == [b"patient"]
    [link] = transport.links.values()
    assert link.unanswered == {}


def test_dropped_calls_are_dropped_by_the_fall_back_too(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Answered] = []
    monkeypatch.setattr(Answered, "drop", lambda self: dropped.append(self))
    pending = connect(Elsewhere()).send([call(b"x"), call(b"y", "b")])
    pending.drop()
    assert len(dropped) == 2
    assert pending.wait() == [CallFailure.TIMED_OUT] * 2


def test_calls_beyond_the_window_go_elsewhere(actors: Actors, connect: Open) -> None:
    actors.add("a")
    other = Elsewhere()
    transport = connect(other)
    until(lambda: ask(transport, call(b"x")) == [b"x"], "a stream is made")
    other.frames.clear()
    actors.echoes["a"].open.clear()
    pending_calls = [transport.send(within(1.0, [call(b"%d" % i)])) for i in range(WINDOW + 3)]
    assert other.frames == [("a", b"%d" % i) for i in range(WINDOW, WINDOW + 3)]
    actors.echoes["a"].open.set()
    expected = [[b"%d" % i] for i in range(WINDOW)] + [[b"elsewhere"]] * 3
    assert [answers(pending.wait()) for pending in pending_calls] == expected


def test_a_stream_that_is_found_broken_while_calls_are_sent_is_no_death(
    actors: Actors, connect: Open
) -> None:
    for name in "ab":
        actors.add(name)
    other = Elsewhere()
    transport = connect(other)
    calls = [call(name.encode(), name) for name in "ba"]
    until(lambda: ask(transport, *calls) == [b"b", b"a"], "both streams are there")
    ask(transport, call(b"a"))  # whoever answered last is asked first
    actors.echoes["a"].open.clear()
    held = [transport.send(within(LIMIT_S, [call(b"held")])) for _ in range(WINDOW)]
    transport.links["b"].channel.sock.shutdown(socket.SHUT_RDWR)
    other.frames.clear()
    # That the window to a is full makes the transport look at all of its connections.
    pending = transport.send(
        within(LIMIT_S, [call(b"later"), call(b"b", "b")._replace(replaceable=True)])
    )
    assert other.frames == [("a", b"later"), ("b", b"b")]
    assert answers(pending.wait()) == [b"elsewhere", b"elsewhere"]
    actors.echoes["a"].open.set()
    assert [answers(one.wait()) for one in held] == [[b"held"]] * WINDOW


def test_without_a_fall_back_a_full_window_is_no_death(actors: Actors, connect: Open) -> None:
    actors.add("a")
    transport = connect()
    ask(transport, call(b"hello"))
    actors.echoes["a"].open.clear()
    pending_calls = [transport.send(within(LIMIT_S, [call(b"x")])) for _ in range(WINDOW)]
    assert ask(transport, call(b"one more")) == [CallFailure.TIMED_OUT]
    actors.echoes["a"].open.set()
    assert [answers(pending.wait()) for pending in pending_calls] == [[b"x"]] * WINDOW
    assert ask(transport, call(b"one more")) == [b"one more"]


def test_frames_and_answers_that_are_too_long_go_elsewhere(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "MAX_MESSAGE_BYTES", 1000)
    actors.add("a")
    other = Elsewhere()
    transport = connect(other)
    until(lambda: ask(transport, call(b"x")) == [b"x"], "a stream is made")
    other.frames.clear()
    assert ask(transport, call(bytes(1001))) == [b"elsewhere"]
    actors.echoes["a"].answer = lambda frame: (frame, bytes(1000))
    assert ask(transport, call(b"y")) == [b"elsewhere"]
    assert other.frames == [("a", bytes(1001)), ("a", b"y")]
    actors.echoes["a"].answer = lambda frame: (frame,)
    assert ask(transport, call(bytes(1000))) == [bytes(1000)]


def test_an_actor_that_ends_breaks_its_streams(actors: Actors, connect: Open) -> None:
    before = set(threading.enumerate())
    server = actors.add("a")
    other = Elsewhere()
    transport = connect(other)
    until(lambda: ask(transport, call(b"x")) == [b"x"], "a stream is made")
    server.close()
    assert "stream" not in {thread.name for thread in set(threading.enumerate()) - before}
    until(lambda: ask(transport, call(b"x")) == [b"elsewhere"], "the stream has ended")
    with pytest.raises(OSError, match="no longer serves streams"):
        server.offer(Network.UNIX)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_answering_fails_ends_its_streams(actors: Actors, connect: Open) -> None:
    server = actors.add("a")
    transport = connect(Elsewhere())
    until(lambda: ask(transport, call(b"x")) == [b"x"], "a stream is made")

    def fail(frame: bytes) -> Buffers:
        raise SystemExit  # ends a thread without a word

    actors.echoes["a"].answer = fail
    assert ask(transport, call(b"y")) == [b"elsewhere"]
    assert server._thread is not None
    server._thread.join(LIMIT_S)


# Strangers.


def still_serves(actors: Actors, connect: Open) -> None:
    assert ask(connect(), call(b"good")) == [b"good"]


def closed_by_peer(sock: socket.socket) -> bool:
    sock.settimeout(LIMIT_S)
    try:
        while sock.recv(65_536):
            pass
    except ConnectionError:
        pass
    return True


GARBAGE = {
    "bytes": b"\xff" * 100,
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a huge length": struct.pack("<QQ", 1 << 62, 1) + b"x",
    "a message one byte too long": struct.pack("<QQ", HELLO_BYTES + 1, 1) + bytes(80),
    "a message too short": struct.pack("<QQ", 8, 1) + bytes(16),
    "no message": struct.pack("<QQ", 0, 1),
    "an unknown key": struct.pack("<QQ", HELLO_BYTES, 1) + secrets.token_bytes(HELLO_BYTES),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", GARBAGE)
def test_a_stranger_is_cut_off_and_nobody_else_is_disturbed(
    actors: Actors, connect: Open, name: str, network: Network
) -> None:
    server = actors.add("a")
    transport = connect()
    assert ask(transport, call(b"before")) == [b"before"]
    sock = open_socket(server.offer(network), None)
    sock.sendall(GARBAGE[name])
    assert closed_by_peer(sock)
    sock.close()
    assert ask(transport, call(b"after")) == [b"after"]
    assert actors.echoes["a"].batches == [[b"before"], [b"after"]]
    still_serves(actors, connect)


def test_a_wrong_secret_is_refused(actors: Actors) -> None:
    offer = actors.add("a").offer(Network.UNIX)
    wrong = StreamOffer(offer.network, offer.address, offer.key_id, secrets.token_bytes(32))
    with pytest.raises(OSError, match="closed"):
        greet(open_socket(offer, None), wrong)
    with pytest.raises(OSError, match="closed"):  # and has used up the key
        greet(open_socket(offer, None), offer)


def test_a_key_opens_one_stream_and_only_for_a_while(
    actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = actors.add("a")
    offer = server.offer(Network.UNIX)
    greet(open_socket(offer, None), offer).close()
    with pytest.raises(OSError, match="closed"):
        greet(open_socket(offer, None), offer)
    monkeypatch.setattr(server_module, "KEY_LIFE_S", 0.0)
    stale = server.offer(Network.UNIX)
    with pytest.raises(OSError, match="closed"):
        greet(open_socket(stale, None), stale)


def test_keys_that_nobody_uses_are_bounded(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_KEYS", 3)
    server = actors.add("a")
    offers = [server.offer(Network.UNIX) for _ in range(5)]
    for offer in offers[:2]:
        with pytest.raises(OSError, match="closed"):
            greet(open_socket(offer, None), offer)
    for offer in offers[2:]:
        greet(open_socket(offer, None), offer).close()


def test_the_actors_proof_is_no_good_as_the_routers(actors: Actors) -> None:
    secret, actor_nonce, router_nonce = secrets.token_bytes(32), new_nonce(), new_nonce()
    shown = {side: proof(secret, side, actor_nonce, router_nonce) for side in Side}
    assert len(set(shown.values())) == len(Side)
    assert shown[Side.ACTOR] != proof(secret, Side.ACTOR, router_nonce, actor_nonce)


def test_a_router_does_not_talk_to_a_stranger_at_the_actors_address() -> None:
    ours, theirs = socket.socketpair()
    offer = StreamOffer(Network.UNIX, b"\0x", secrets.token_bytes(16), secrets.token_bytes(32))
    stranger = Channel(theirs)

    def pretend() -> None:
        stranger.send(0, (bytes(16),))
        read_messages(stranger, 1)
        stranger.send(0, (bytes(32),))

    pretending = threading.Thread(target=pretend)
    pretending.start()
    with pytest.raises(ConnectionError, match="does not have the secret"):
        greet(ours, offer)
    pretending.join(LIMIT_S)
    theirs.close()


def test_a_router_gives_up_on_an_actor_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.transport.stream.connect.CONNECT_TIMEOUT_S", 0.1)
    ours, theirs = socket.socketpair()
    offer = StreamOffer(Network.UNIX, b"\0x", bytes(16), bytes(32))
    with pytest.raises(TimeoutError, match="no greeting"):
        greet(ours, offer)
    theirs.close()


def test_a_half_open_connection_is_dropped_in_time(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HELLO_TIMEOUT_S", 0.1)
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    server = actors.add("a")
    silent = open_socket(server.offer(Network.UNIX), None)
    assert closed_by_peer(silent)
    silent.close()
    still_serves(actors, connect)


def test_a_stranger_costs_little_memory(actors: Actors) -> None:
    server = actors.add("a")
    strangers = [open_socket(server.offer(Network.UNIX), None) for _ in range(20)]
    until(lambda: len(server._peers) == 20, "all are there")
    assert sum(len(peer.channel._buffer) for peer in server._peers) < 10_000
    for stranger in strangers:
        stranger.close()
    until(lambda: not server._peers, "all have left")


def test_connections_are_bounded(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    server = actors.add("a")
    transport = connect()
    assert ask(transport, call(b"x")) == [b"x"]
    second = open_socket(server.offer(Network.UNIX), None)
    until(lambda: len(server._peers) == 2, "the second is there")
    third = open_socket(server.offer(Network.UNIX), None)
    assert closed_by_peer(third)
    second.close()
    third.close()
    until(lambda: len(server._peers) == 1, "the second has left")
    still_serves(actors, connect)


def test_a_router_that_does_not_read_is_not_read_from_and_is_cut_off_in_time(
    actors: Actors, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "STALLED_S", 0.3)
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    server = actors.add("a")
    router = greeted(actors)
    router.sock.setblocking(True)
    router.sock.settimeout(0.1)
    frame = bytes(16 * 6250)
    sent = 0
    try:
        for call_id in range(1000):
            router.sock.sendall(struct.pack("<QQ", len(frame), call_id) + frame)
            sent += 1
    except OSError:  # it is not read any more, or cut off already
        pass
    assert sent < 300
    until(lambda: not server._peers, "the actor has dropped it")
    router.close()
    still_serves(actors, connect)


@pytest.mark.parametrize("length", [1000, channel_module.MAX_MESSAGE_BYTES + 1])
def test_an_admitted_router_that_sends_too_much_or_leaves_in_a_message_disturbs_nobody(
    actors: Actors, connect: Open, length: int
) -> None:
    actors.add("a")
    router = greeted(actors)
    router.sock.setblocking(True)
    router.sock.sendall(struct.pack("<QQ", length, 1) + bytes(500))
    if length > channel_module.MAX_MESSAGE_BYTES:
        assert closed_by_peer(router.sock)
    router.close()
    still_serves(actors, connect)
    assert actors.echoes["a"].batches == [[b"good"]]


# TLS.


@pytest.fixture
def authority(tmp_path: Path) -> Callable[[str], Authority]:
    return lambda name: new_authority(tmp_path / name)


@pytest.mark.parametrize("size", [1, 16_384, 5_000_000])
def test_a_stream_between_hosts_can_be_encrypted(
    actors: Actors, connect: Open, authority: Callable[[str], Authority], size: int
) -> None:
    ours = authority("ours")
    actors.add("a", tls=ours.server)
    actors.networks = [Network.TCP]
    transport = connect(tls=ours.client)
    frames = [secrets.token_bytes(size) for _ in range(5)]
    assert [ask(transport, call(frame)) for frame in frames] == [[frame] for frame in frames]
    [link] = transport.links.values()
    assert isinstance(link.channel.sock, ssl.SSLSocket)
    assert link.channel.sock.version() == "TLSv1.3"
    pending_calls = [transport.send(within(LIMIT_S, [call(frame)])) for frame in frames]
    assert [answers(pending.wait()) for pending in pending_calls] == [[frame] for frame in frames]


def test_frames_that_overfill_the_buffer_of_an_encrypted_stream_come_back_as_they_were(
    actors: Actors, connect: Open, authority: Callable[[str], Authority]
) -> None:
    ours = authority("ours")
    actors.add("a", tls=ours.server)
    actors.networks = [Network.TCP]
    transport = connect(tls=ours.client)
    assert ask(transport, call(b"first")) == [b"first"]
    echo = actors.echoes["a"]
    echo.open.clear()
    blocked = transport.send([call(b"blocked")])
    assert echo.entered.acquire(timeout=LIMIT_S)
    assert echo.entered.acquire(timeout=LIMIT_S)
    # While the actor computes, more arrives than its buffer holds: after its next read, decrypted
    # bytes wait, and others in the socket.
    frames = [bytes([number]) * (BUFFER_BYTES // 3) for number in range(1, WINDOW)]
    pending_calls = [transport.send([call(frame)]) for frame in frames]
    echo.open.set()
    assert answers(blocked.wait()) == [b"blocked"]
    assert [answers(pending.wait()) for pending in pending_calls] == [[frame] for frame in frames]


@pytest.mark.parametrize("who", ["the router", "the actor", "a router without TLS"])
def test_who_has_no_certificate_of_the_authority_gets_no_stream(
    actors: Actors, connect: Open, authority: Callable[[str], Authority], who: str
) -> None:
    ours, theirs = authority("ours"), authority("theirs")
    actors.add("a", tls=(theirs if who == "the actor" else ours).server)
    actors.networks = [Network.TCP]
    client = {"the router": theirs.client, "the actor": ours.client}.get(who)
    transport = connect(tls=client)
    assert ask(transport, call(b"x"), timeout_s=0.5) == [CallFailure.DIED]
    assert actors.echoes["a"].batches == []
