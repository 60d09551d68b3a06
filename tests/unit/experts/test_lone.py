"""Frames that come alone: native code answers them as the queue does, and leaves it the others."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cluster.native import native
from cluster.spec import FRAME_VERSION, ExpertKey
from cluster.transport.base import Call
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.connect import Connector
from cluster.transport.stream.handshake import Network, StreamOffer
from cluster.transport.stream.server import ReceivedAlone, StreamServer
from cluster.transport.stream.sockets import SEND_BUFFER_BYTES
from cluster.wire.frames import Buffer, Buffers, ErrorFrame, RowsFrame, decode
from experts import lone
from experts import queue as queue_module
from experts.lone import MAX_WAIT_MS
from tests.cluster_fixture import wait_until
from tests.unit.experts.frames import dispatch_bytes
from tests.unit.experts.local_actor import HIDDEN, LIMIT_S, Actor, frame_of, local_actor, rows_of

TRACE = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


class Served:
    """An actor behind a stream server, and a router's transport to it."""

    def __init__(self, folder: Path) -> None:
        self.actor = local_actor(folder)
        self.by_python: list[bytes] = []
        self.server = StreamServer(self._answer, "127.0.0.1", None, alone=self.actor._queue)
        self.transport = self.connect()

    def connect(self) -> StreamTransport:
        transport = StreamTransport(Connector(self._offer, None), None)
        wait_until(lambda: transport.is_ready("expert-0", 1), "a stream is there", LIMIT_S)
        return transport

    def _offer(
        self, actor: str, generation: int, network: Network, timeout_s: float
    ) -> StreamOffer:
        return self.server.offer(Network.UNIX)

    def _answer(self, frames: Sequence[Buffer]) -> Iterator[Buffers]:
        self.by_python += [bytes(frame) for frame in frames]
        return self.actor.compute_all(frames)

    def ask(self, *frames: bytes) -> list[bytes]:
        """Send frames at once, and return their answers."""
        calls = [Call("expert-0", 1, (frame,), LIMIT_S) for frame in frames]
        outcomes = self.transport.send(calls).wait()
        assert all(isinstance(outcome, bytes | memoryview) for outcome in outcomes), outcomes
        return [bytes(outcome) for outcome in outcomes]  # type: ignore[arg-type]

    def ask_alone(self, frame: bytes) -> bytes:
        """Return the answer of native code: asks again where it was the queue's turn."""
        for _ in range(100):
            before = len(self.by_python)
            [answer] = self.ask(frame)
            if len(self.by_python) == before:
                return answer
        raise AssertionError("Python has answered every time")

    def close(self) -> None:
        self.transport.close()
        self.server.close()


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    made = Served(folder)
    yield made
    made.close()


@pytest.fixture
def long_wait_s(monkeypatch: pytest.MonkeyPatch, served: Served) -> float:
    """Have native code wait for frames as long as it may: a busy machine holds up less."""
    monkeypatch.setattr(lone, "MAX_WAIT_MS", 1000)
    served.ask(frame_of(rows_of(1)))
    served.ask(frame_of(rows_of(1)))
    return 0.9


def by_queue(actor: Actor, frame: bytes) -> bytes:
    return b"".join(next(actor.compute_all([frame])))


@pytest.mark.parametrize(
    "counts", [{3: 1}, {3: 2}, {3: 7}, {3: 33}, {3: 200}, {3: 1, 0: 1}, {3: 5, 0: 2}, {3: 1, 0: 40}]
)
def test_a_lone_frame_gets_the_queues_answer_bit_for_bit(
    served: Served, counts: dict[int, int]
) -> None:
    rows = rows_of(sum(counts.values()))
    frame = dispatch_bytes(rows, counts, request_id=1 << 63)
    assert served.ask_alone(frame) == by_queue(served.actor, frame)
    other = dispatch_bytes(rows, {3: len(rows)}, request_id=1 << 63, layer_id=2)
    assert served.ask_alone(other) == by_queue(served.actor, other) != served.ask_alone(frame)


def test_reports_count_lone_frames(served: Served) -> None:
    served.ask_alone(frame_of(rows_of(1)))
    before, by_python = served.actor.describe(), len(served.by_python)
    for _ in range(20):
        served.ask(dispatch_bytes(rows_of(5), {0: 2, 3: 3}))
    after = served.actor.describe()
    assert (after.steps - before.steps, after.frames - before.frames) == (20, 20)
    assert after.busy_s > before.busy_s
    assert after.queued_rows == 0
    for expert_id, count in ((0, 2), (3, 3)):
        key = ExpertKey("m", 0, expert_id)
        assert after.tokens[key] - before.tokens.get(key, 0) == 20 * count
    assert len(served.by_python) - by_python < 20


def test_a_look_at_answers_is_left_to_the_self_test(served: Served) -> None:
    began_s, count, waits = time.monotonic(), 0, 0.0
    while waits < 4 or len(served.by_python) < 2 or count <= len(served.by_python):
        assert time.monotonic() < began_s + LIMIT_S, (count, len(served.by_python))
        served.ask(frame_of(rows_of(1)))
        count += 1
        waits = (time.monotonic() - began_s) / (MAX_WAIT_MS / 1000)
    assert len(served.by_python) <= 2 * waits


def damaged(**parts: bytes) -> bytes:
    """Return a frame of one row with other bytes from the places on that the names end in."""
    frame = bytearray(frame_of(rows_of(1)))
    for name, data in parts.items():
        place = int(name.removeprefix("at_"))
        frame[place : place + len(data)] = data
    return bytes(frame)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    "frame",
    [
        damaged(at_25=struct.pack("<H", 5)),
        damaged(at_31=struct.pack("<d", -1.0)),
        damaged(at_17=u32(2), at_21=u32(HIDDEN // 2), at_27=u32(2)),
        damaged(at_3=b"\x02", at_21=u32(HIDDEN * 2)),
        damaged(at_0=struct.pack("<H", FRAME_VERSION + 1)),
        damaged(at_17=u32(0), at_27=u32(0)),
    ],
    ids=["no expert", "over", "other width", "other dtype", "other version", "no rows"],
)
def test_whatever_cannot_be_computed_is_refused_as_by_the_queue(
    served: Served, frame: bytes
) -> None:
    [answer] = served.ask(frame)
    assert answer == by_queue(served.actor, frame)
    assert isinstance(decode(answer), ErrorFrame)
    good = frame_of(rows_of(1))
    assert served.ask(good) == [by_queue(served.actor, good)]  # the connection lives on


def test_damaged_frames_of_any_kind_get_the_queues_answer(served: Served) -> None:
    generator = random.Random(5)
    whole = dispatch_bytes(rows_of(3), {0: 1, 3: 2})
    # All but the time that is left: a very short one may be over in the queue alone.
    places = [*range(37), *range(45, 64)]
    for _ in range(400):
        frame = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            frame[generator.choice(places)] = generator.choice((0, 1, 2, 3, 255))
        data = bytes(frame[: generator.choice((len(frame), len(frame), 20, 40, 90))])
        [answer] = served.ask(data)
        expected = by_queue(served.actor, data)
        assert answer == expected


def test_traced_frames_frames_at_once_and_all_without_native_code_are_the_queues(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = frame_of(rows_of(1))
    served.ask_alone(frame)
    traced = frame_of(rows_of(1), traceparent=TRACE)
    served.by_python.clear()
    served.ask(traced)
    assert served.by_python == [traced]
    both = [frame_of(rows_of(2), 5), frame_of(rows_of(3), 6)]
    assert served.ask(*both) == [by_queue(served.actor, frame) for frame in both]
    monkeypatch.setattr(queue_module, "IS_BUILT", False)
    by_queue(served.actor, frame)  # interrupts native code
    served.by_python.clear()
    for _ in range(5):
        served.ask(frame)
    assert served.by_python == [frame] * 5


def test_two_routers_at_once_get_their_own_answers(served: Served) -> None:
    others = [served.connect() for _ in range(3)]

    def are_right(seed: int, transport: StreamTransport) -> bool:
        frame = frame_of(rows_of(seed + 1, seed), request_id=seed)
        expected = by_queue(served.actor, frame)
        calls = [Call("expert-0", 1, (frame,), LIMIT_S)]
        return all(transport.send(calls).wait() == [expected] for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(are_right, range(4), [served.transport, *others], timeout=LIMIT_S))
    for transport in others:
        transport.close()


def test_rows_that_are_not_finite_come_by_the_queue_and_are_tested(served: Served) -> None:
    frame = frame_of(rows_of(1))
    served.ask_alone(frame)
    parts = served.actor._bank.lone.by_name[b"\0\0\0\0m"][0]
    parts[3] = np.full(len(parts[3]) // 4, np.nan, np.float32).view(np.uint8).data
    served.by_python.clear()
    for _ in range(5):
        [answer] = served.ask(frame)
        assert answer == by_queue(served.actor, frame)  # the bank's experts are whole
    assert served.by_python == [frame] * 5


def test_an_unloaded_expert_is_not_held_and_its_memory_is_free(
    served: Served, long_wait_s: float
) -> None:
    frame = frame_of(rows_of(1))
    served.ask_alone(frame)
    begun_at_s = time.monotonic()
    served.actor.unload(1, [ExpertKey("m", 0, 3)])
    assert time.monotonic() - begun_at_s < long_wait_s
    names = served.actor._bank.lone.by_name
    assert b"\0\0\0\0m" in names  # expert 0 is still here
    refused = decode(served.ask(frame)[0])
    assert isinstance(refused, ErrorFrame)
    assert refused.kind == "WrongPlacementError"
    served.actor.load(1, served.actor._spec, [ExpertKey("m", 0, 3)])
    assert isinstance(decode(served.ask_alone(frame)), RowsFrame)
    served.actor.unload(1, [ExpertKey("m", 0, 0), ExpertKey("m", 0, 3)])
    assert b"\0\0\0\0m" not in names


def test_neither_a_ray_call_nor_an_end_waits_for_the_streams(
    served: Served, long_wait_s: float
) -> None:
    frame = frame_of(rows_of(1))
    served.ask_alone(frame)
    for _ in range(20):
        begun_at_s = time.monotonic()
        by_queue(served.actor, frame)
        assert time.monotonic() - begun_at_s < long_wait_s
        served.ask(frame)
    begun_at_s = time.monotonic()
    served.server.close()
    assert time.monotonic() - begun_at_s < long_wait_s


def test_a_full_socket_gets_the_rest_of_an_answer_later(served: Served) -> None:
    frame = frame_of(rows_of(200))
    expected = by_queue(served.actor, frame)
    served.ask_alone(frame)
    link = served.transport.links["expert-0"]
    link.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    [peer] = served.server._peers
    peer.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    send_rest, rests = peer.channel.send_rest, []
    peer.channel.send_rest = lambda *given: (rests.append(given[2]), send_rest(*given))[1]
    # Nobody reads meanwhile, so that the socket takes a part of the answer alone.
    pending = served.transport.send([Call("expert-0", 1, (frame,), LIMIT_S)])
    wait_until(lambda: rests, "a part of the answer is left", LIMIT_S)
    assert pending.wait() == [expected]
    assert 0 < rests[0] < len(expected)
    peer.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    assert served.ask_alone(frame) == expected


def test_a_router_that_leaves_costs_no_other_its_answer(served: Served) -> None:
    frame = frame_of(rows_of(1))
    expected = served.ask_alone(frame)
    for _ in range(10):
        leaving = served.connect()
        with suppress(OSError):
            leaving.send([Call("expert-0", 1, (frame,), LIMIT_S)])
        leaving.close()
        assert served.ask(frame) == [expected]
    wait_until(lambda: len(served.server._peers) == 1, "the others are dropped", LIMIT_S)


def test_an_answer_that_cannot_be_sent_ends_its_connection(served: Served) -> None:
    queue = served.actor._queue
    served.ask_alone(frame_of(rows_of(1)))
    answer_alone = queue.answer_alone
    failed = []

    def failing(epoll_fd: int, buffers: dict[int, memoryview]) -> ReceivedAlone | None:
        [fd] = buffers
        failed.append(fd)
        queue.answer_alone = answer_alone
        return fd, 0, (1, b"answer", -1)

    queue.answer_alone = failing
    by_queue(served.actor, frame_of(rows_of(1)))  # interrupts native code
    link = served.transport.links["expert-0"]
    wait_until(lambda: failed and not served.server._peers, "the connection ends", LIMIT_S)
    link.channel.close()


@pytest.mark.parametrize(
    "wrong", [{1: 0}, {2: 0}, {3: bytearray(8)}, {5: -1}, {5: 1 << 20}, {0: "no number"}]
)
def test_wrong_arguments_are_refused(wrong: dict[int, object]) -> None:
    assert native is not None
    arguments: list[object] = [0, {}, {}, bytearray(32), FRAME_VERSION, 1]
    for index, value in wrong.items():
        arguments[index] = value
    with pytest.raises((TypeError, ValueError)):
        native.answer_lone(*arguments)
