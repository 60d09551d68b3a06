"""Frames that are longer than a socket's buffer leave while the router computes."""

from __future__ import annotations

import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster.errors import ExpertUnavailableError
from cluster.transport.base import Call, CallFailure, IsGone, Outcome, PendingCalls, never_gone
from cluster.transport.stream import sockets as sockets_module
from cluster.transport.stream.channel import Channel
from cluster.transport.stream.client import StreamTransport
from cluster.transport.stream.link import Link
from cluster.transport.stream.sockets import prepare_unix
from tests.checkpoints import VOCAB_SIZE, save_mixtral
from tests.cluster_fixture import prompt_of
from tests.local_cluster import MODEL, LocalCluster, greedy_request
from tests.unit.cluster.transport.channels import read_messages

LIMIT_S = 60.0
BUFFER_BYTES = 32 << 10
"""The sockets' send buffers here."""
FRAME_BYTES = 1_500_000
pytestmark = pytest.mark.usefixtures("native")


class Wire:
    """A transport with a connection to each of its actors, whose ends the test has."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._buffer_bytes = buffer_bytes
        self.actors: dict[str, Channel] = {}
        self.transport = StreamTransport(self, None)  # type: ignore[arg-type]

    def take(self, actor_id: str, generation: int, timeout_s: float) -> Channel:
        """Connect, as a :class:`Connector` does."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
        self.actors[actor_id] = Channel(theirs)
        return Channel(ours)

    def close(self) -> None:
        """See :class:`Connector`."""

    def end(self) -> None:
        self.transport.close()
        for actor in self.actors.values():
            actor.close()

    def send(self, *calls: Call) -> Pending:
        return Pending(self.transport.send(calls))

    def link(self, actor_id: str = "a") -> Link[Any]:
        return self.transport.links[actor_id]


class Pending:
    """Pending calls that are waited for on a thread of their own."""

    def __init__(self, calls: PendingCalls) -> None:
        self.calls = calls
        self._outcomes: list[Outcome] = []
        self._thread: threading.Thread | None = None

    def begin(self, is_gone: IsGone = never_gone) -> Pending:
        def wait() -> None:
            self._outcomes = [
                outcome if isinstance(outcome, CallFailure) else bytes(outcome)
                for outcome in self.calls.wait(is_gone)
            ]

        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()
        return self

    @property
    def is_waiting(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def outcomes(self) -> list[Outcome]:
        if self._thread is None:
            self.begin()
        assert self._thread is not None
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self._outcomes


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.end()


def call(frame: bytes, actor_id: str = "a", timeout_s: float = LIMIT_S, **more: Any) -> Call:
    return Call(actor_id, 1, (frame[:5], frame[5:]), timeout_s, **more)


READER = """
import socket, sys, time
sock = socket.socket(fileno=int(sys.argv[1]))
print("ready", flush=True)
left = int(sys.argv[2])
while left > 0:
    left -= len(sock.recv(65_536))
print(time.monotonic(), flush=True)
"""


def test_the_rest_of_a_frame_needs_no_interpreter_with_native_code(
    native: ModuleType | None,
) -> None:
    """A thread that attends in native code holds it for as long as the call takes."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    command = [sys.executable, "-c", READER, str(theirs.fileno()), str(FRAME_BYTES)]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        link: Link[Any] = Link("a", 1, Channel(ours))
        link.channel.send(1, (bytes(FRAME_BYTES),))
        link.take_over(1)
        sum(range(20_000_000))  # one call, and all of the interpreter
        ended_s = time.monotonic()
        read_s = float(reader.stdout.readline())
        link.close()
        theirs.close()
    assert read_s < ended_s or native is None


def test_a_short_frame_needs_no_thread(wire: Wire) -> None:
    pending = wire.send(call(b"short frame"))
    assert not wire.link().channel.outgoing
    assert wire.link().writer is None
    [(call_id, _)] = read_messages(wire.actors["a"])
    wire.actors["a"].send(call_id, (b"answer",))
    assert pending.outcomes() == [b"answer"]
    assert "stream-writer" not in {thread.name for thread in threading.enumerate()}


def test_a_call_is_not_given_up_while_its_bytes_leave(wire: Wire) -> None:
    """The actor takes longer to read than it has for its answer."""
    frame = secrets.token_bytes(FRAME_BYTES)
    for timeout_s in (0.5, 5.0):  # a busy machine may pause for the first, after the last byte
        pending = wire.send(call(frame, timeout_s=timeout_s)).begin()
        begun_s = time.monotonic()
        [(call_id, received)] = read_messages(wire.actors["a"], pause_s=0.15 * timeout_s)
        assert received == frame
        assert time.monotonic() - begun_s > 1.5 * timeout_s
        if pending.is_waiting:
            break
    assert pending.is_waiting
    wire.actors["a"].send(call_id, (b"answer",))
    assert pending.outcomes() == [b"answer"]


def test_a_call_is_given_up_when_no_answer_follows_its_last_byte(wire: Wire) -> None:
    pending = wire.send(call(bytes(FRAME_BYTES), timeout_s=0.3)).begin()
    read_messages(wire.actors["a"], pause_s=0.01)
    read_s = time.monotonic()
    assert pending.outcomes() == [CallFailure.TIMED_OUT]
    assert time.monotonic() - read_s < LIMIT_S / 2


def test_an_actor_that_reads_nothing_is_given_up_in_a_calls_time(wire: Wire) -> None:
    begun_s = time.monotonic()
    pending = wire.send(call(bytes(FRAME_BYTES), timeout_s=0.2), call(b"short", "b", 0.2))
    assert pending.outcomes() == [CallFailure.TIMED_OUT] * 2
    assert 0.2 <= time.monotonic() - begun_s < LIMIT_S / 2


def test_a_call_ends_in_any_case_though_bytes_leave(wire: Wire) -> None:
    end_s = time.monotonic() + 0.5
    pending = wire.send(call(bytes(10 * FRAME_BYTES), timeout_s=0.4, end_s=end_s)).begin()
    while pending.is_waiting:
        wire.actors["a"].receive()
        time.sleep(0.02)
    assert pending.outcomes() == [CallFailure.TIMED_OUT]
    assert 0 <= time.monotonic() - end_s < LIMIT_S / 2
    assert wire.link().channel.outgoing


def test_frames_leave_one_behind_the_other(wire: Wire) -> None:
    frames = [secrets.token_bytes(size) for size in (FRAME_BYTES, 9, FRAME_BYTES, 70_000)]
    pending = [wire.send(call(frame)) for frame in frames]
    assert wire.link().channel.outgoing  # and nobody waits
    received = read_messages(wire.actors["a"], len(frames))
    assert [frame for _, frame in received] == frames
    for call_id, frame in reversed(received):
        wire.actors["a"].send(call_id, (frame[:9],))
    assert [one.outcomes() for one in pending] == [[frame[:9]] for frame in frames]
    # The next frame goes out directly again.
    last = wire.send(call(b"short"))
    assert not wire.link().channel.outgoing
    [(call_id, _)] = read_messages(wire.actors["a"])
    wire.actors["a"].send(call_id, (b"last",))
    assert last.outcomes() == [b"last"]


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_connection_that_ends_half_way_fails_the_call_at_once(
    wire: Wire, replaceable: bool
) -> None:
    pending = wire.send(call(bytes(FRAME_BYTES), replaceable=replaceable)).begin()
    wire.actors["a"].receive()
    wire.actors["a"].close()
    assert pending.outcomes() == [CallFailure.DIED]
    again = wire.send(call(b"again"))
    [(call_id, _)] = read_messages(wire.actors["a"])
    wire.actors["a"].send(call_id, (b"answer",))
    assert again.outcomes() == [b"answer"]


def test_a_connection_that_cannot_be_written_to_fails_the_call(wire: Wire) -> None:
    """Its other direction may be open."""
    pending = wire.send(call(bytes(FRAME_BYTES), replaceable=True)).begin()
    wire.actors["a"].sock.shutdown(socket.SHUT_RD)
    assert pending.outcomes() == [CallFailure.DIED]


def test_the_answers_of_dropped_calls_are_dropped(wire: Wire) -> None:
    dropped = wire.send(call(bytes(FRAME_BYTES)), call(b"begun"))
    dropped.calls.drop()
    assert dropped.outcomes() == [CallFailure.TIMED_OUT] * 2
    kept = wire.send(call(bytes(range(100))))
    received = read_messages(wire.actors["a"], 3)
    assert received[2][1] == bytes(range(100))
    for call_id, _ in received:
        wire.actors["a"].send(call_id, (b"answer %d" % call_id,))
    assert kept.outcomes() == [b"answer %d" % received[2][0]]
    writer = wire.link().writer
    assert writer is not None
    assert (writer._left_at_s, list(writer._ends)) == ({}, [])


def test_a_dropped_frame_has_memory_of_its_own(wire: Wire) -> None:
    """The caller's may be pinned memory, which the next copy of a device overwrites."""
    memory = bytearray(secrets.token_bytes(FRAME_BYTES))
    frame = bytes(memory)
    pending = wire.send(Call("a", 1, (b"head", memoryview(memory)), LIMIT_S))
    pending.calls.drop()
    memory[:] = bytes(FRAME_BYTES)
    [(_, received)] = read_messages(wire.actors["a"])
    assert received == b"head" + frame


def test_a_transport_is_closed_while_bytes_wait(wire: Wire) -> None:
    wire.send(call(bytes(FRAME_BYTES)))
    assert wire.link().channel.outgoing
    begun_s = time.monotonic()
    wire.transport.close()
    assert time.monotonic() - begun_s < LIMIT_S
    assert "stream-writer" not in {thread.name for thread in threading.enumerate()}


def test_how_long_an_actor_is_silent_counts_from_the_last_byte_that_moved(wire: Wire) -> None:
    silent_s: list[float] = []

    def is_gone(asked: Call, since_s: float) -> bool:
        silent_s.append(since_s)
        return False

    pending = wire.send(call(bytes(FRAME_BYTES))).begin(is_gone)
    begun_s = time.monotonic()
    [(call_id, _)] = read_messages(wire.actors["a"], pause_s=0.02)
    took_s = time.monotonic() - begun_s
    assert len(silent_s) >= 2
    assert max(silent_s) < took_s / 2
    wire.actors["a"].send(call_id, (b"answer",))
    assert pending.outcomes() == [b"answer"]


def test_the_time_of_answers_is_not_known_where_they_were_there_before_the_wait(
    wire: Wire,
) -> None:
    pending = wire.send(call(b"frame"), call(b"frame", "b"))
    answers = {"a": b"short", "b": bytes(FRAME_BYTES)}
    for actor_id, answer in answers.items():
        [(call_id, _)] = read_messages(wire.actors[actor_id])
        wire.actors[actor_id].send(call_id, (answer,))
    reading = threading.Thread(target=lambda: drained(wire.actors["b"]))
    time.sleep(0.05)  # the caller attends other tokens
    reading.start()
    assert pending.outcomes() == list(answers.values())
    assert pending.calls.took_s is None
    reading.join(LIMIT_S)

    pending = wire.send(call(b"frame"), call(b"frame", "b"))
    [(call_id, _)] = read_messages(wire.actors["a"])
    wire.actors["a"].send(call_id, (b"there",))
    time.sleep(0.05)
    pending.begin()
    time.sleep(0.05)
    [(call_id, _)] = read_messages(wire.actors["b"])
    wire.actors["b"].send(call_id, (b"awaited",))
    assert pending.outcomes() == [b"there", b"awaited"]
    assert pending.calls.took_s is not None
    assert pending.calls.took_s >= 0.1


def drained(channel: Channel) -> None:
    """Send all that waits, as an actor does."""
    while channel.outgoing:
        channel.write(100)


def test_a_request_ends_at_its_deadline_while_its_frames_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the connection would be replaced as silent, and its frames gone with it.
    monkeypatch.setattr("cluster.transport.stream.link.SILENT_S", LIMIT_S)
    save_mixtral(tmp_path)
    wire, plain = Wire(buffer_bytes=1), LocalCluster(tmp_path)  # as small as can be
    cluster = LocalCluster(tmp_path, elsewhere=(MODEL, wire.transport, plain.placement))
    try:
        begun_s = time.monotonic()
        prompt = prompt_of(500, 77, VOCAB_SIZE)
        with pytest.raises(ExpertUnavailableError):
            cluster.generate(greedy_request("r", prompt, 4, timeout_s=1.0))
        assert time.monotonic() - begun_s < LIMIT_S
        assert any(link.channel.outgoing for link in wire.transport.links.values())
    finally:
        cluster.close()
        plain.close()
        wire.end()


def test_a_smaller_buffer_than_asked_for_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sockets_module._log_small_buffer.cache_clear()
    ours, theirs = socket.socketpair()
    with ours, theirs, caplog.at_level(logging.INFO, "expertmesh.stream"):
        prepare_unix(ours)
        caplog.clear()
        sockets_module._log_small_buffer.cache_clear()
        monkeypatch.setattr(sockets_module, "SEND_BUFFER_BYTES", 1 << 30)
        for end in (ours, theirs, ours):
            prepare_unix(end)
    [line] = caplog.messages
    assert f"of {1 << 30} wanted" in line
